"""API keys: where they come from, and whom each stands for.

A file of keys has one on each line, behind its holder's name: `alice sk-…`, or `alice sha256:` and the key's
SHA-256 in hex. Lines that begin with `#` are comments. Several keys may have one name; they share a cache.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from jinn.server import errors

logger = logging.getLogger("jinn.server")

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_CHECK_SECONDS = 1.0  # between two looks at the file


@dataclass(frozen=True, slots=True)
class Holder:
    """Who asks: the name behind a key. Nothing of one tenant is ever used for another."""

    name: str | None
    tenant: str


ANYONE = Holder(None, "anonymous")  # the one holder of a server without keys
_OPERATOR = Holder("default", "key:default")  # of the key that is no file's


class KeyFile:
    """The keys of a file, read again when it changes. A file that turns bad leaves the last good keys."""

    def __init__(self, path: str) -> None:
        """Raises OSError, ValueError naming the line."""
        self._path = Path(path)
        self._stamp = self._stat()
        self._checked_at = time.monotonic()
        self.keys = read_keys(self._path)

    def refresh(self, *, now: bool = False) -> None:
        """Read the file again if it has changed; `now` looks even if the last look was a moment ago."""
        if not now and time.monotonic() < self._checked_at + _CHECK_SECONDS:
            return
        self._checked_at = time.monotonic()
        try:
            stamp = self._stat()
            if stamp == self._stamp and not now:
                return
            self.keys = read_keys(self._path)
            self._stamp = stamp
            logger.info("read %d API keys", len(self.keys))
        except (OSError, ValueError) as error:
            logger.error("the API keys stay as they were: %s", error)

    def _stat(self) -> tuple[int, int, int]:
        status = os.stat(self._path)
        return status.st_mtime_ns, status.st_size, status.st_ino


def read_keys(path: Path) -> dict[bytes, str]:
    """Names by the SHA-256 of their keys. Raises OSError, and ValueError naming the line, never a key."""
    keys: dict[bytes, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = line.split()
        if len(rest) != 1 or not _NAME.fullmatch(name):
            raise ValueError(f"{path}, line {number}: expected a name and a key")
        (key,) = rest
        match = _DIGEST.fullmatch(key)
        digest = bytes.fromhex(match[1]) if match else digest_of(key)
        if digest in keys:
            raise ValueError(f"{path}, line {number}: the key is there twice")
        keys[digest] = name
    if not keys:
        raise ValueError(f"{path} has no keys")
    return keys


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Keyring:
    """All keys that are accepted. Only their digests are kept."""

    def __init__(self, api_key: str | None, file: KeyFile | None) -> None:
        self._digest = None if api_key is None else digest_of(api_key)
        self._file = file

    def reload(self) -> None:
        """Read the file again."""
        if self._file is not None:
            self._file.refresh(now=True)

    def holder(self, key: str | None) -> Holder:
        """Whom a key stands for. Raises APIError 401."""
        if self._digest is None and self._file is None:
            return ANYONE
        if not key:
            raise errors.invalid_api_key("An API key is needed, sent as 'authorization: Bearer KEY'.")
        digest = digest_of(key)
        holders = []
        if self._digest is not None and hmac.compare_digest(self._digest, digest):
            holders.append(_OPERATOR)
        if self._file is not None:
            self._file.refresh()
            # Every key is compared, so that the time taken does not tell which one came close.
            names = [name for known, name in self._file.keys.items() if hmac.compare_digest(known, digest)]
            holders += [Holder(name, f"key:{name}") for name in names]
        if not holders:
            raise errors.invalid_api_key("The API key is not valid.")
        return holders[0]
