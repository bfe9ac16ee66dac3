"""Logs as JSON, one object a line, with a fixed set of fields so that no key or prompt slips in."""

from __future__ import annotations

import json
import logging
import time
import traceback
from typing import Any, Literal

LogLevel = Literal["debug", "info", "warning", "error"]

_FIELDS = (
    "request_id",
    "key",  # its holder's name
    "model",
    "method",
    "route",
    "status",
    "ms",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
)


class JSONFormatter(logging.Formatter):
    """Writes time, level, logger, message, the known extra fields, and where an exception came from."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: value for name in _FIELDS if (value := getattr(record, name, None)) is not None})
        if record.exc_info:
            line["traceback"] = _traceback(record.exc_info[1])
        return json.dumps(line)


def _traceback(error: BaseException | None) -> list[str]:
    """Where it went wrong, and the error's kind; its text may quote a prompt."""
    if error is None:
        return []
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames] + [type(error).__name__]


def configure_logging(level: str) -> None:
    """Send everything of `level` and above to standard error, as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
