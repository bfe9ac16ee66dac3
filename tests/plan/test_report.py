"""Reports, in a browser: their charts are drawn, and nothing is asked of any host."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.browser import Browser

EXAMPLES = Path(__file__).parents[2] / "examples" / "plan"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("plotly")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize(
    ("command", "example", "charts"),
    [
        ("serve", "deepseek-disclosure", 2),
        ("serve", "qwen3-next", 5),
        ("train", "training", 2),
        ("market", None, 1),
    ],
)
def test_charts_are_drawn_and_no_host_is_asked(run, browser, tmp_path, command, example, charts):
    page = tmp_path / "page.html"
    scenario = [EXAMPLES / f"{example}.toml"] if example else []
    result = run("plan", command, *scenario, "--report", page)
    assert result.exit_code == 0, result.stderr
    browser.events.clear()
    browser.call("Page.navigate", url=page.as_uri())
    browser.wait_for("document.querySelectorAll('.chart').length > 0 && document.readyState === 'complete'")
    browser.wait_for(f"document.querySelectorAll('.chart svg.main-svg').length >= {charts}")
    assert browser.evaluate("document.querySelectorAll('.chart').length") == charts
    marks = "'.bars path, .scatterlayer path'"
    assert browser.evaluate(f"[...document.querySelectorAll('.chart')].every(c => c.querySelector({marks}))")
    assert {url.partition(":")[0] for url in browser.requested_urls()} <= {"file", "data", "blob"}
    assert len([url for url in browser.requested_urls() if url.startswith("file")]) == 1
    wrong = ("Runtime.exceptionThrown", "Log.entryAdded")
    errors = [event for event in browser.events if event.get("method") in wrong]
    assert errors == []


def test_text_is_escaped(run, tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    name = "<script>alert(1)</script>"
    options = ("--model", "Qwen3-8B", "--chip", "H20", "--set", f"name={name}", "--report", page)
    assert run("plan", "serve", *options).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert name not in text
    assert "&lt;script&gt;alert(1)" in text
