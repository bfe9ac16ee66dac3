"""Responses that may be continued or retrieved, in memory, within bounds for each key and for all."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from jinn.server.wire import to_json

MAX_TENANT_BYTES = 16 * 2**20
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that has ended: as it was answered, its input, and the conversation up to its end."""

    response: dict[str, Any]
    input_items: list[dict[str, Any]]
    messages: list[dict[str, Any]]  # of a chat request, without instructions
    num_bytes: int

    @classmethod
    def create(
        cls,
        response: dict[str, Any],
        input_items: list[dict[str, Any]],
        messages: list[dict[str, Any]],
    ) -> StoredResponse:
        num_bytes = len(to_json([response, input_items, messages]))
        return cls(response, input_items, messages, num_bytes)


class ResponseStore:
    """The least recently used go first: of the same key where it has too much, else of all keys."""

    def __init__(self, max_tenant_bytes: int = MAX_TENANT_BYTES, max_bytes: int = MAX_BYTES) -> None:
        self._max_tenant_bytes = max_tenant_bytes
        self._max_bytes = max_bytes
        self._stored: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._tenant_bytes: dict[str, int] = {}

    @property
    def num_bytes(self) -> int:
        return sum(self._tenant_bytes.values())

    def add(self, tenant: str, stored: StoredResponse) -> None:
        """Keep a response; one that is too large alone is not kept."""
        if stored.num_bytes > self._max_tenant_bytes:
            return
        self._stored[tenant, stored.response["id"]] = stored
        self._tenant_bytes[tenant] = self._tenant_bytes.get(tenant, 0) + stored.num_bytes
        while self._tenant_bytes[tenant] > self._max_tenant_bytes:
            self._remove(next(key for key in self._stored if key[0] == tenant))
        while self.num_bytes > self._max_bytes:
            self._remove(next(iter(self._stored)))

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A response of this key."""
        stored = self._stored.get((tenant, response_id))
        if stored is not None:
            self._stored.move_to_end((tenant, response_id))
        return stored

    def delete(self, tenant: str, response_id: str) -> bool:
        """Forget a response of this key. Returns whether there was one."""
        if (tenant, response_id) not in self._stored:
            return False
        self._remove((tenant, response_id))
        return True

    def _remove(self, key: tuple[str, str]) -> None:
        self._tenant_bytes[key[0]] -= self._stored.pop(key).num_bytes
        if not self._tenant_bytes[key[0]]:
            del self._tenant_bytes[key[0]]
