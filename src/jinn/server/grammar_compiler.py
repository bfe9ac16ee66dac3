"""Grammars of requests, compiled in a process that is killed if one takes too long or brings it down."""

from __future__ import annotations

import asyncio
import json
import logging
import select
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinn.server import errors

logger = logging.getLogger("jinn.server")

COMPILE_SECONDS = 2.0
MAX_BYTES = 512 * 2**10  # of what a grammar is made from, as JSON
MAX_WAITING = 64  # requests whose grammars are to be compiled

WORKER_COMMAND = (sys.executable, "-m", "jinn.text.grammar.worker")
_START_SECONDS = 20.0
_MAX_KEPT_BYTES = 4 * 2**20  # of the grammars compiled last, and what they were made from
_READ_BYTES = 1 << 16

_Key = tuple[str, str]


class GrammarCompiler:
    """Turns what a request asks for into a grammar. The process starts with the first; `close()` ends it."""

    def __init__(self, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._command = command
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._num_waiting = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._kept: OrderedDict[_Key, str] = OrderedDict()  # the last used last
        self._kept_bytes = 0

    async def compile(self, kind: str, value: Any, param: str) -> str:
        """The grammar's text. Raises APIError 400, naming `param` and a JSON pointer in it, and 503."""
        key = (kind, json.dumps(value))
        if len(key[1]) > MAX_BYTES:
            raise errors.invalid_grammar(param, "", f"it has more than {MAX_BYTES} bytes")
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self._num_waiting >= MAX_WAITING:
            raise errors.unavailable("Too many grammars are waiting to be compiled.", 5)
        self._num_waiting += 1
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, key)
        finally:
            self._num_waiting -= 1
        if "error" in answer:
            raise errors.invalid_grammar(param, answer["pointer"], answer["error"])
        self._keep(key, answer["text"])
        return str(answer["text"])

    def close(self) -> None:
        self._thread.shutdown()
        self._kill()

    def _keep(self, key: _Key, text: str) -> None:
        self._kept[key] = text
        self._kept_bytes += _size(key, text)
        while self._kept_bytes > _MAX_KEPT_BYTES:
            self._kept_bytes -= _size(*self._kept.popitem(last=False))

    def _ask(self, key: _Key) -> dict[str, str]:
        """What the process answers, or an error in its place."""
        kind, value = key
        try:
            process = self._running()
            answer = self._exchange(process, f'["{kind}",{value}]\n'.encode(), COMPILE_SECONDS)
            return dict(json.loads(answer))
        except TimeoutError:
            logger.warning("a grammar took more than %g seconds to compile", COMPILE_SECONDS)
            error = f"it takes more than {COMPILE_SECONDS:g} seconds to compile"
        except (OSError, ValueError):
            logger.warning("a grammar ended the process that compiles them")
            error = "it is too complex"
        self._kill()
        return {"error": error, "pointer": ""}

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, which has started: the time to import what it needs is no grammar's."""
        if self._process is None:
            self._process = subprocess.Popen(  # noqa: S603  (the command is ours)
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
            self._exchange(self._process, b'["json_object",null]\n', _START_SECONDS)
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes:
        """A line for a line. Raises TimeoutError, and OSError where the process has ended."""
        if process.stdin is None or process.stdout is None:
            raise OSError("the process has no pipes")
        unsent = memoryview(line)
        while unsent:
            unsent = unsent[process.stdin.write(unsent) :]
        deadline = time.monotonic() + seconds
        answer = b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError
            piece = process.stdout.read(_READ_BYTES)
            if not piece:
                raise OSError("the process has ended")
            answer += piece
        return answer

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _size(key: _Key, text: str) -> int:
    return len(key[1]) + len(text)
