"""A Hugging Face hub on localhost, just enough of it for `huggingface_hub` to list and download files."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub(ThreadingHTTPServer):
    """Serves `files` of one repository at one commit, and at most `body_budget` bytes of them in all."""

    daemon_threads = True

    def __init__(self, repo: str, commit: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo, self.commit, self.files = repo, commit, files
        self.body_budget = 1 << 40
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range header

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        resolve = f"{self.server.repo}/resolve/{self.server.commit}/"
        if path.startswith(f"api/models/{self.server.repo}"):
            self._send_info(path)
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.server.files:
            self._send_file(self.server.files[path.removeprefix(resolve)], with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if path.startswith("api/") else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send_info(self, path: str) -> None:
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": "0" * 40} | _lfs(name, data)
            for name, data in self.server.files.items()
        ]
        info = {"id": self.server.repo, "modelId": self.server.repo, "sha": self.server.commit}
        body = json.dumps(
            info | {"siblings": siblings, "private": False, "tags": [], "downloads": 0}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, data: bytes, with_body: bool) -> None:
        start = 0
        if requested := self.headers.get("Range"):
            start = int(requested.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if with_body:
            body = data[start : start + self.server.body_budget]
            self.server.body_budget -= len(body)
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _lfs(name: str, data: bytes) -> dict[str, object]:
    if not name.endswith((".safetensors", ".gguf")):
        return {}
    return {"lfs": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}}
