"""`jinn serve` on a real model as a process, and what the tests ask of it from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from .test_serve import free_port, wait_until_ready


class RealServer:
    """The server's processes, started with `arguments` and ready."""

    def __init__(self, *arguments: str) -> None:
        port = free_port()
        self.port = port
        script = Path(__file__).with_name("real_process.py")
        self.popen = subprocess.Popen(  # noqa: S603
            [sys.executable, str(script), "serve", *arguments, "--port", str(port), "--log-level", "warning"],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        wait_until_ready(self.http)
        api = psutil.Process(self.popen.pid)
        self.processes = [api, *api.children(recursive=True)]
        times = [process.cpu_times() for process in self.processes]
        self.cpu_seconds_to_ready = sum(spent.user + spent.system for spent in times)

    def stop(self) -> int:
        """End it as an operator would. Returns the exit status."""
        self.http.close()
        self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(40)
        finally:
            self.popen.kill()
            self.popen.communicate()

    def held(self) -> dict[str, int]:
        """What the API process holds; see `real_process.py`."""
        assert self.popen.stdout is not None
        self.popen.send_signal(signal.SIGUSR1)
        counts: dict[str, int] = json.loads(self.popen.stdout.readline())
        return counts

    def num_fds(self) -> list[int]:
        """Open file descriptors, by process."""
        return [process.num_fds() for process in self.processes]

    def metric(self, name: str) -> float:
        """A gauge of /metrics."""
        match = re.search(rf"^jinn:{name}\{{.*\}} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert match is not None
        return float(match[1])

    def peak_memory(self) -> int:
        """The sum of the processes' VmHWM, in bytes."""
        statuses = [Path(f"/proc/{process.pid}/status").read_text() for process in self.processes]
        return sum(int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 for status in statuses)

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        """Wait until the engine says that it has nothing to do and holds no block for a sequence."""
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        deadline = time.monotonic() + seconds
        while any(values := {name: self.metric(name) for name in gauges}.values()):
            assert time.monotonic() < deadline, values
            time.sleep(0.05)

    def complete(self, **body: Any) -> str:
        """The text of one completion."""
        answer = self.http.post("/v1/completions", json={"temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text
