"""The chat page, in a browser and as files."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.models import Models
from jinn.server.serve import bind
from jinn.server.service import Service

from .browser import Browser
from .fakes import ANSWER, ByteTokenizer, FakeEngine, encode_chat

HOSTILE = "<img src=x onerror=alert(1)><script>document.title='run'</script>"


class Site:
    """A server with the fake engine, in a thread of its own."""

    def __init__(self, config: ServerConfig) -> None:
        self.engine = FakeEngine(step_seconds=0.005)
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        service = Service(config, self.engine, ByteTokenizer(), encode_chat, file_name="tiny.gguf")
        settings = uvicorn.Config(App(Models.of(service)), log_config=None, lifespan="off", http="h11")
        self.server = uvicorn.Server(settings)

        async def serve() -> None:
            await service.start()
            await self.server.serve([listener])

        self.thread = threading.Thread(target=asyncio.run, args=(serve(),))
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site(ServerConfig(api_key="sk-page"))
    yield site
    site.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(site: Site, browser: Browser) -> Browser:
    """The page, with the key entered."""
    browser.events.clear()
    browser.call("Page.navigate", url=site.url)
    browser.wait_for("document.readyState == 'complete' && !!document.getElementById('key')")
    browser.evaluate(
        "{const key = document.getElementById('key'); key.value = 'sk-page';"
        "key.dispatchEvent(new Event('change'))}"
    )
    browser.wait_for("document.getElementById('model').value == 'tiny.gguf'")
    return browser


def say(page: Browser, text: str) -> None:
    page.evaluate(
        f"document.getElementById('prompt').value = {json.dumps(text)};"
        "document.getElementById('form').requestSubmit()"
    )


def test_chat(page: Browser, site: Site) -> None:
    say(page, "Hello")
    page.wait_for("document.getElementById('status').textContent.includes('tokens/s')")
    assert page.evaluate("document.querySelector('article.assistant').innerText") == ANSWER
    assert page.evaluate("document.querySelector('article.user').innerText") == "Hello"
    say(page, "Again")
    page.wait_for(
        "document.querySelectorAll('article.assistant').length == 2 && document.getElementById('stop').hidden"
    )
    prompt = bytes(site.engine.submitted[-1].prompt_ids).decode()
    assert prompt == f"user:Hello\nassistant:{ANSWER}\nuser:Again\n"
    assert all(url.startswith(site.url) for url in page.requested_urls())
    violations = [event for event in page.events if "Content Security Policy" in json.dumps(event)]
    assert not violations


def test_stop(page: Browser, site: Site) -> None:
    site.engine.answer = list(b"x" * 100_000)
    try:
        say(page, "Go on")
        page.wait_for("document.querySelector('article.assistant')?.innerText.length > 5")
        page.evaluate("document.getElementById('stop').click()")
        page.wait_for("document.getElementById('status').textContent == 'Stopped.'")
        page.wait_for("document.getElementById('stop').hidden")
    finally:
        site.engine.answer = list(ANSWER.encode())
    assert site.engine.aborted


def test_text_is_never_run(page: Browser, site: Site) -> None:
    site.engine.answer = list(HOSTILE.encode())
    try:
        say(page, HOSTILE)
        page.wait_for("document.getElementById('status').textContent.includes('tokens/s')")
    finally:
        site.engine.answer = list(ANSWER.encode())
    for role in ("user", "assistant"):
        assert page.evaluate(f"document.querySelector('article.{role}').innerText") == HOSTILE
    assert page.evaluate("document.querySelectorAll('img, main script').length") == 0
    assert page.evaluate("document.title") == "jinn"


def test_thoughts_are_folded_and_calls_shown(page: Browser) -> None:
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning_content": "Let me "}}]},
        {"choices": [{"delta": {"reasoning_content": "think."}}]},
        {"choices": [{"delta": {"content": "Asking."}}]},
        {"choices": [{"delta": {"tool_calls": [
            {"index": 0, "id": "c", "function": {"name": "weather", "arguments": ""}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]}}]},
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 5}},
    ]  # fmt: skip
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.evaluate(f"window.fetch = async () => new Response({json.dumps(stream)})")
    say(page, "Hello")
    page.wait_for("document.getElementById('status').textContent.includes('tokens/s')")
    assert page.evaluate("document.querySelector('details').open") is False
    assert page.evaluate("document.querySelector('details span').textContent") == "Let me think."
    assert page.evaluate("document.querySelector('pre.call').textContent") == 'weather({"a":1})'


def test_errors_are_shown(page: Browser) -> None:
    page.evaluate("document.getElementById('key').value = 'wrong'")
    say(page, "Hello")
    page.wait_for("document.querySelector('article.error')?.innerText == 'The API key is not valid.'")


async def test_files(client: httpx.AsyncClient) -> None:
    for path, media_type in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        response = await client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(media_type)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    text = "".join([(await client.get(path)).text for path in ("/", "/page.js", "/page.css")])
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text


def test_page_is_in_the_package() -> None:
    import jinn.server

    assert {path.name for path in (Path(jinn.server.__path__[0]) / "page").iterdir()} == {
        "index.html",
        "page.js",
        "page.css",
    }
