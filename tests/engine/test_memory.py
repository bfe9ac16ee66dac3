"""What fits into memory, and what a token reads where it does not."""

from __future__ import annotations

import pytest

from jinn.engine import memory
from jinn.engine.memory import OVERHEAD_BYTES, Footprint, available_memory, disk_speed

GIB = 2**30
MIXTURE = Footprint(weights=10 * GIB, experts=8 * GIB, experts_per_token=GIB)


def test_a_disk_is_timed(tmp_path):
    for size in (0, 5000, 10**8):
        path = tmp_path / "file"
        path.write_bytes(bytes(size))
        assert 0 <= disk_speed(path) < 1e12


def test_all_fits_beside_the_cache_or_does_not():
    room = 12 * GIB + OVERHEAD_BYTES
    assert MIXTURE.fits(2 * GIB, room)
    assert not MIXTURE.fits(2 * GIB, room - 1)
    assert MIXTURE.uncached_per_token(2 * GIB, room) == 0


@pytest.mark.parametrize(("missing", "read"), [(8, 1.0), (4, 0.5), (1, 0.125), (100, 1.0)])
def test_a_token_reads_its_share_of_what_has_no_room(missing, read):
    room = (12 - missing) * GIB + OVERHEAD_BYTES
    assert MIXTURE.uncached_per_token(2 * GIB, room) == pytest.approx(read * GIB, rel=1e-6)


def test_without_experts_nothing_is_read_from_disk():
    assert Footprint(10 * GIB, 0, 0).uncached_per_token(0, GIB) == 0


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "5", 8192 * 1024), ("1000", "400", 600), ("400", "1000", 0), (f"{2**40}", "5", 8192 * 1024)],
)
def test_a_control_group_may_grant_less_than_there_is(tmp_path, monkeypatch, limit, used, expected):
    (tmp_path / "meminfo").write_text("MemTotal:  9999 kB\nMemAvailable:    8192 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert available_memory() == 8192 * 1024
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    assert available_memory() == expected
