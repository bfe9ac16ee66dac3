"""Which slot holds the recurrent states of which sequence, and snapshots of states that later prompts reuse.

Keys and values can be cut anywhere; a recurrent state is good for exactly the tokens it has taken in. So a
prompt can only go on from a prefix at which a snapshot was taken. A snapshot is a slot that no sequence
holds; it stays until its slot is needed, the least recently used first. Knows neither blocks nor models.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b

from jinn.engine.cache import IntegrityError
from jinn.ops.protocol import NO_ADAPTER, IntArray

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Prefix:
    """The tokens a snapshot has taken in, through which adapter, and whose they are."""

    tenant: str
    num_tokens: int
    digest: bytes


class StatePool:
    """Gives out the slots `0` to `num_slots - 1`.

    `copy_state(source, target)` copies the states of a slot at once. `tenant_quota_slots` bounds the
    snapshots of a tenant.
    """

    def __init__(
        self, num_slots: int, copy_state: Callable[[int, int], None], tenant_quota_slots: int | None = None
    ) -> None:
        self.num_slots = num_slots
        self._copy_state = copy_state
        self._tenant_quota_slots = tenant_quota_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._snapshots: OrderedDict[Prefix, int] = OrderedDict()  # to their slots, least recently used first
        self._lengths: dict[str, Counter[int]] = {}  # of each tenant's snapshots

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    @property
    def num_available_slots(self) -> int:
        """Slots that can be given out: free, or kept for reuse only."""
        return len(self._free) + len(self._snapshots)

    def start(self, tenant: str, token_ids: IntArray, adapter: int = NO_ADAPTER) -> tuple[int, int]:
        """A slot with the states of the longest snapshot, and how many of the first tokens they took in.

        For 0 tokens they are whatever they are. Raises ValueError where no slot is available.
        """
        prefix = self._longest(tenant, token_ids, adapter)
        if prefix is None:
            if (slot := self._take()) is None:
                raise ValueError("all state slots are in use")
            return slot, 0
        source = self._snapshots[prefix]
        self._snapshots.move_to_end(prefix)
        slot = self._take(spared=prefix)
        if slot is None:  # the snapshot itself is the only slot left
            slot = self._forget(prefix)
        else:
            self._copy_state(source, slot)
        return slot, prefix.num_tokens

    def snapshot(self, slot: int, tenant: str, token_ids: IntArray, adapter: int = NO_ADAPTER) -> None:
        """Keep a copy of a slot that has taken in just `token_ids`, if one can be had."""
        prefix = _prefix(tenant, token_ids, adapter)
        if self._touch(prefix):
            return
        target = self._take()
        if target is not None:
            self._copy_state(slot, target)
            self._insert(prefix, target)

    def keep(self, slot: int, tenant: str, token_ids: IntArray, adapter: int = NO_ADAPTER) -> None:
        """Give up a slot that has taken in just `token_ids`; it stays as their snapshot."""
        prefix = _prefix(tenant, token_ids, adapter)
        if not len(token_ids) or self._touch(prefix):
            self._free.append(slot)
        else:
            self._insert(prefix, slot)

    def release(self, slot: int) -> None:
        """Give up a slot whose states are of no use."""
        self._free.append(slot)

    def evict(self, num_slots: int) -> None:
        """Free up to `num_slots` snapshots, the least recently used first."""
        for _ in range(min(num_slots, len(self._snapshots))):
            self._free.append(self._forget(next(iter(self._snapshots))))

    def check_integrity(self, used: Iterable[int]) -> None:
        """Raise IntegrityError naming the fault unless each slot is once free, a snapshot, or in `used`."""
        owners = Counter((*self._free, *self._snapshots.values(), *used))
        for slot in range(self.num_slots):
            if owners[slot] != 1:
                raise IntegrityError(f"state slot {slot} has {owners[slot]} owners")
        if owners.keys() - set(range(self.num_slots)):
            raise IntegrityError("a state slot is out of range")
        lengths: dict[str, Counter[int]] = {}
        for prefix in self._snapshots:
            lengths.setdefault(prefix.tenant, Counter())[prefix.num_tokens] += 1
        if lengths != self._lengths:
            raise IntegrityError("the lengths of the snapshots are miscounted")

    def _longest(self, tenant: str, token_ids: IntArray, adapter: int) -> Prefix | None:
        """The longest snapshot of the first tokens, all of which are hashed once."""
        lengths = sorted(n for n in self._lengths.get(tenant, ()) if n <= len(token_ids))
        longest, hashed, digest = None, 0, _new_digest(adapter)
        for length in lengths:
            digest.update(token_ids[hashed:length].tobytes())
            hashed = length
            prefix = Prefix(tenant, length, digest.digest())
            if prefix in self._snapshots:
                longest = prefix
        return longest

    def _take(self, spared: Prefix | None = None) -> int | None:
        if self._free:
            return self._free.pop()
        oldest = next((prefix for prefix in self._snapshots if prefix != spared), None)
        return None if oldest is None else self._forget(oldest)

    def _touch(self, prefix: Prefix) -> bool:
        """Whether there is this snapshot, which then counts as used."""
        if prefix in self._snapshots:
            self._snapshots.move_to_end(prefix)
            return True
        return False

    def _insert(self, prefix: Prefix, slot: int) -> None:
        self._snapshots[prefix] = slot
        lengths = self._lengths.setdefault(prefix.tenant, Counter())
        lengths[prefix.num_tokens] += 1
        if self._tenant_quota_slots is not None and lengths.total() > self._tenant_quota_slots:
            self._free.append(self._forget(next(p for p in self._snapshots if p.tenant == prefix.tenant)))

    def _forget(self, prefix: Prefix) -> int:
        """Its slot, which is a snapshot no more."""
        lengths = self._lengths[prefix.tenant]
        lengths[prefix.num_tokens] -= 1
        if not lengths[prefix.num_tokens]:
            del lengths[prefix.num_tokens]
        if not lengths:
            del self._lengths[prefix.tenant]
        return self._snapshots.pop(prefix)


def _prefix(tenant: str, token_ids: IntArray, adapter: int) -> Prefix:
    digest = _new_digest(adapter)
    digest.update(token_ids.tobytes())
    return Prefix(tenant, len(token_ids), digest.digest())


def _new_digest(adapter: int) -> blake2b:
    return blake2b(digest_size=_DIGEST_BYTES, salt=adapter.to_bytes(4, "little", signed=True))
