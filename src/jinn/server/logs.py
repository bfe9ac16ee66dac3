"""Logs as JSON, one object a line, with a fixed set of fields so that no key or prompt slips in."""

from __future__ import annotations

import json
import logging
import time

_FIELDS = (
    "request_id",
    "method",
    "route",
    "status",
    "ms",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
)


class JSONFormatter(logging.Formatter):
    """Writes time, level, logger, message, the known extra fields, and a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: value for name in _FIELDS if (value := getattr(record, name, None)) is not None})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str) -> None:
    """Send everything of `level` and above to standard error, as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
