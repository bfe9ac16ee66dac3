"""The engine in a process of its own: `python -m jinn.engine.process FD`.

FD is an inherited socket to the process that started it, whose first message is a `Start`. It ends when told
to, or when the other end of the socket closes, so it never outlives its parent.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from jinn.engine.config import EngineConfig
from jinn.engine.engine import Engine
from jinn.engine.frames import FrameReader, frame, read_frame
from jinn.engine.messages import Abort, Failed, Loading, Message, Score, Shutdown, Start, Submit, decode
from jinn.engine.start import LoadRunner, Progress, start_engine
from jinn.logs import configure_logging

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 18
_MAX_UNSENT_BYTES = 1 << 24  # no further step while the reader is this far behind
_IDLE_MS = 1000
_FINISH_SECONDS = 2.0
_FINISH_POLL_MS = 100


class Connection:
    """Sends and receives messages without ever blocking on a peer that does not read."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._reader = FrameReader()
        self._unsent = bytearray()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    @property
    def is_congested(self) -> bool:
        return len(self._unsent) > _MAX_UNSENT_BYTES

    def send(self, message: Message) -> None:
        """Send, or keep for later what the socket does not take now. Raises EOFError if the peer is gone."""
        self._unsent += frame(message)
        self._flush()

    def receive(self, timeout_ms: int | None) -> list[Message]:
        """The messages that have come; waits up to `timeout_ms` (None: for ever) for the socket to be ready.

        Raises EOFError if the peer is gone.
        """
        self._poll.modify(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if not self._poll.poll(timeout_ms):
            return []
        self._flush()
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except ConnectionError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        return [message for part in self._reader.feed(data) if (message := _decode(part))]

    def finish(self) -> None:
        """Wait until the peer has taken all and, for `_FINISH_SECONDS` at most, until it closes.

        A peer that writes to a closed socket would not read what is left there.
        """
        deadline = monotonic() + _FINISH_SECONDS
        with suppress(EOFError):
            while self._unsent or monotonic() < deadline:
                self.receive(_FINISH_POLL_MS)

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except ConnectionError as error:
            raise EOFError from error


def _decode(data: bytes) -> Message | None:
    """A message that makes no sense is dropped: it is one request's fault at most."""
    try:
        return decode(data)
    except ValueError:
        logger.exception("a message of %d bytes was not understood", len(data))
        return None


def serve(connection: Connection, engine: Engine) -> None:
    """Step while there is work, wait while there is none. Returns when told to shut down."""
    is_checked = True  # the cache's books, since the last step
    while True:
        can_step = engine.has_work and not connection.is_congested
        messages = connection.receive(0 if can_step else None if is_checked else _IDLE_MS)
        for message in messages:
            if isinstance(message, Shutdown):
                return
            _apply(message, engine)
        if engine.has_work and not connection.is_congested:
            connection.send(engine.step())
            is_checked = False
        elif not engine.has_work and not messages:
            engine.check_integrity()
            is_checked = True


def _apply(message: Message, engine: Engine) -> None:
    if isinstance(message, Submit):
        try:
            engine.submit(message)
        except ValueError as error:
            logger.error("%s", error)
    elif isinstance(message, Score):
        engine.score(message)
    elif isinstance(message, Abort):
        engine.abort(message)
    else:
        logger.error("%s is not for the engine", type(message).__name__)


def _progress(connection: Connection) -> Progress:
    """Tells of each further percent."""
    last_percent = -1

    def report(loaded_bytes: int, total_bytes: int) -> None:
        nonlocal last_percent
        percent = 100 * loaded_bytes // max(total_bytes, 1)
        if percent != last_percent:
            last_percent = percent
            connection.send(Loading(loaded_bytes, total_bytes))

    return report


def run(sock: socket.socket, config: EngineConfig, load_runner: LoadRunner) -> int:
    """Load the model and serve it until the end. Returns the exit status."""
    connection = Connection(sock)
    try:
        try:
            engine = start_engine(config, load_runner, _progress(connection))
        except ValueError as error:  # a model or setting that is refused, which the parent tells its user
            return _fail(connection, error)
        try:
            connection.send(engine.ready)
            serve(connection, engine)
        except EOFError:
            raise
        except Exception as error:
            logger.exception("the engine cannot go on")
            return _fail(connection, error)
    except EOFError:
        logger.info("the process that started the engine is gone")
    return 0


def _fail(connection: Connection, error: Exception) -> int:
    """Tell the parent why this process ends. Returns the exit status."""
    connection.send(Failed(str(error) or type(error).__name__))
    connection.finish()
    return 1


def main(arguments: Sequence[str], load_runner: LoadRunner) -> int:
    """Run with the argument FD. Returns the exit status."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # meant for the whole group; the parent says when to end
        signal.signal(signum, signal.SIG_IGN)
    with socket.socket(fileno=int(arguments[0])) as sock:
        try:
            start = decode(read_frame(sock))
        except (EOFError, ConnectionError):
            return 0  # not needed after all
        if not isinstance(start, Start):
            raise ValueError(f"expected a Start, got a {type(start).__name__}")
        config = EngineConfig.from_json(start.config)
        configure_logging(config.log_level)
        return run(sock, config, load_runner)


if __name__ == "__main__":
    from jinn.engine.loading import load_runner

    sys.exit(main(sys.argv[1:], load_runner))
