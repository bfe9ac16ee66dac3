"""How much memory a process may still take, and whether a model fits into it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from jinn.models.sources import ParameterSource
from jinn.weights.lora import LoraAdapter

# What serving takes besides weights and cache: two interpreters, libraries, tokenizer, activations.
OVERHEAD_BYTES = 200 * 10**6

_PROBED_BYTES, _CHUNK_BYTES = 2**26, 2**22

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that the system and this process's control group (version 2) would still give."""
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return available if limit == "max" else min(available, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return available


def disk_speed(path: Path) -> float:
    """Bytes per second of reading a file from its middle, past the system's cache where that can be."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    except OSError:  # not every file system reads past its cache
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        start = max(os.fstat(fd).st_size - _PROBED_BYTES, 0) // 2 // _CHUNK_BYTES * _CHUNK_BYTES
        page_aligned = mmap.mmap(-1, _CHUNK_BYTES)
        started, total = perf_counter(), 0
        while total < _PROBED_BYTES and (count := os.preadv(fd, [page_aligned], start + total)):
            total += count
        return total / (perf_counter() - started)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a model's weights in memory, its adapters' too, and what a token reads of them."""

    weights: int
    experts: int  # of the weights: the experts of all mixtures
    experts_per_token: int

    def fits(self, cache_memory: int, available: int) -> bool:
        """Whether all weights have room beside the cache."""
        return self.weights + cache_memory + OVERHEAD_BYTES <= available

    def uncached_per_token(self, cache_memory: int, available: int) -> int:
        """Bytes that a token reads from disk, if it chooses any expert as likely as another."""
        if self.fits(cache_memory, available) or not self.experts:
            return 0
        room = available - cache_memory - OVERHEAD_BYTES - (self.weights - self.experts)
        return int(self.experts_per_token * (1 - max(0, room) / self.experts))


def footprint(sources: Iterable[ParameterSource], adapters: Iterable[LoraAdapter] = ()) -> Footprint:
    """Of a checkpoint's parameters, whose packs are as large as its tensors, and of adapters."""
    weights, experts, per_token = sum(adapter.nbytes for adapter in adapters), 0, 0
    for source in sources:
        weights += source.nbytes
        if source.spec.num_experts_per_tok is not None:
            experts += source.nbytes
            per_token += source.nbytes * source.spec.num_experts_per_tok // source.spec.shape[0]
    return Footprint(weights, experts, per_token)
