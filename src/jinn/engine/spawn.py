"""Starting an engine process, which imports what it needs before it is told what to serve."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jinn import env

ENGINE_COMMAND = (sys.executable, "-m", "jinn.engine.process")


@dataclass(frozen=True, slots=True)
class SpawnedEngine:
    """An engine process that waits for a `Start`, and our end of the socket to it."""

    process: subprocess.Popen[bytes]
    socket: socket.socket

    def discard(self) -> None:
        """End one that nothing was asked of."""
        self.socket.close()
        self.process.kill()
        self.process.wait()


def spawn(command: Sequence[str] = ENGINE_COMMAND) -> SpawnedEngine:
    """Start an engine process. It ends when our end of the socket closes. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(  # noqa: S603  (the command is ours)
                [*command, str(theirs.fileno())], pass_fds=(theirs.fileno(),), env=env.of_engine_process()
            )
        except OSError:
            ours.close()
            raise
    return SpawnedEngine(process, ours)
