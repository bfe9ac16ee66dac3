from __future__ import annotations

import pytest

from jinn.plan.chips import ChipTable, MissingFactError, catalogue, find_chip
from jinn.plan.tables import ScenarioError, read


def test_every_fact_has_a_source_and_a_confidence():
    chips = catalogue()
    assert len(chips) >= 30
    for chip in chips.values():
        for fact in chip.facts.values():
            assert fact.source
            assert fact.date
            assert fact.confidence in {"V", "D", "E", "X"}
            assert 0 <= fact.low <= fact.value <= fact.high


def test_known_values():
    h800 = find_chip("H800")
    assert (h800.peak("bf16"), h800.peak("fp8"), h800.fact("bandwidth")) == (989e12, 1979e12, 3350e9)
    assert h800.fact("scaleup") == 200e9  # one way
    assert h800.fact("rent") == pytest.approx(2 / 3600)
    assert find_chip("A100").peak("fp8") == 312e12  # has none: multiplied as bf16


@pytest.mark.parametrize(
    ("name", "fact"), [("PPU", "bandwidth"), ("Kunlun P800", "memory"), ("Hanguang", "bf16")]
)
def test_a_missing_fact_is_refused_by_name(name, fact):
    with pytest.raises(MissingFactError, match=f"{fact} is not known"):
        find_chip(name).fact(fact)


@pytest.mark.parametrize(
    ("name", "error"), [("H300", "is not in the catalogue"), ("Ascend", "is several chips"), ("H", "several")]
)
def test_names(name, error):
    with pytest.raises(ScenarioError, match=error):
        find_chip(name)


def test_own_chip():
    table = read(ChipTable, {"name": "mine", "bf16": "2 TFLOPS", "bandwidth": "30 GB/s", "memory": "24 GB"})
    chip = table.chip()
    assert find_chip("mine", {"mine": chip}).fact("bandwidth") == 30e9
    with pytest.raises(ScenarioError, match=r"bandwidth '30 GB' is not in units of B/s"):
        read(ChipTable, {"name": "mine", "bandwidth": "30 GB"})
    with pytest.raises(ScenarioError, match="bandwidth must be more than 0"):
        read(ChipTable, {"name": "mine", "bandwidth": 0})
