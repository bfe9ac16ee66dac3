from __future__ import annotations

import asyncio
import sys

import pytest

# Answers each request with three chunks, 20 ms apart, and a usage of 7 tokens out and two a word and 3 in;
# refuses an empty content.
FAKE = """
import http.server, json, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body["stream"] and body["ignore_eos"] and body["stream_options"] == {"include_usage": True}
        if not body["messages"][-1]["content"]:
            self.send_response(400); self.end_headers(); self.wfile.write(b"no content"); return
        self.send_response(200); self.end_headers()
        for content in ("", "a", "b", "c"):
            time.sleep(0.02)
            self.send({"choices": [{"delta": {"content": content}}]})
        num_words = len(body["messages"][-1]["content"].split())
        self.send({"choices": [], "usage": {"completion_tokens": 7, "prompt_tokens": 2 * num_words + 3}})
        self.wfile.write(b"data: [DONE]\\n\\n")
    def send(self, chunk):
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\\n\\n")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def serving(load_script):
    return load_script("serving")


@pytest.fixture
def server(serving):
    return serving.Server("fake", (sys.executable, "-c", FAKE, "{port}"), "/health")


def test_an_answer_is_timed_and_counted(serving, server):
    with server.run() as running:
        assert running.seconds_to_ready > 0
        answer = asyncio.run(serving.ask(running.port, [{"role": "user", "content": "x"}]))
        assert answer.num_tokens == 7
        assert len(answer.chunks) == 3, "a chunk without text is no token"
        assert answer.first >= 0.04
        assert (answer.chunks[-1] - answer.chunks[0]) / 2 <= answer.longest_gap < 1
        speed = asyncio.run(serving.throughput(running.port, serving.Texts(0), 4))
        assert 0 < speed <= 2 * 4 * 7 / 0.16
        with pytest.raises(RuntimeError, match="no content"):
            asyncio.run(serving.ask(running.port, [{"role": "user", "content": ""}]))


def test_a_server_that_ends_is_told(serving):
    with (
        pytest.raises(OSError, match="status 3"),
        serving.Server("bad", (sys.executable, "-c", "exit(3)"), "/health").run(),
    ):
        pass


def test_texts_are_as_long_in_tokens_of_any_model(serving, server):
    texts = serving.Texts(1)
    assert len(texts.user(50)["content"].split()) == 50
    with server.run() as running:
        asyncio.run(texts.count(running.port))
    assert len(texts.user(50)["content"].split()) == 25


def test_texts_share_nothing_and_rounds_repeat(serving):
    texts, again = serving.Texts(1), serving.Texts(1)
    first, second = texts.user(50), texts.user(50)
    assert first != second
    assert again.user(50) == first


def test_the_table_has_ratios_of_rounds(serving):
    found = {"jinn": [{"speed": 4.0}, {"speed": 9.0}], "peer": [{"speed": 2.0}, {"speed": 3.0}]}
    table = serving.markdown("m.gguf", 2, found, ["vLLM"])
    assert "| speed | peer | 2.50 | 2.00–3.00 | 2.50 |" in table
    assert "| all | vLLM | not run" in table
