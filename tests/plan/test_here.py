from __future__ import annotations

import json
from dataclasses import replace

import pytest

from jinn.engine import benchmark
from jinn.plan.efficiency import find_efficiency
from jinn.plan.here import (
    Calibration,
    Run,
    closest,
    fit,
    machine_table,
    predict,
    read_calibration,
    to_toml,
    with_row,
)
from jinn.plan.shapes import shape_of
from jinn.plan.speed import Machine
from jinn.plan.tables import ScenarioError

LIMITS = {"read_bandwidth": 30e9, "int8": 2e12, "bf16": 0.3e12, "f32": 0.4e12}
RUNS = [Run(64), Run(512), Run(24, 1), Run(24, 1, 1000), Run(24, 16, 100)]


@pytest.fixture(scope="module")
def shape(smollm2_path):
    return shape_of(str(smollm2_path))


def machine():
    chip = machine_table("here", LIMITS, 24e9).chip()
    return Machine(chip, find_efficiency("here", "jinn", "dense", "Q4_1"))


def test_a_checkpoint_has_its_own_bytes(shape):
    assert shape.precision == "Q4_1"
    assert shape.work.weight_bytes == pytest.approx(96.58e6, rel=1e-3)


def test_prompts_are_read_in_steps(shape):
    whole = predict(shape, machine(), Run(1024), chunk=512)
    parts = predict(shape, machine(), Run(512), chunk=512)
    assert 2 * parts < whole < 3 * parts  # the second half sees more, and has no head to pay


def test_a_fit_finds_what_made_the_times(shape):
    truth = replace(machine().efficiency, linear=0.11, attention=0.2, weights=0.7, kv=0.3, layer=2e-5)
    measured = {run: predict(shape, Machine(machine().chip, truth), run, 512) for run in RUNS}
    found = fit(shape, machine().chip, machine().efficiency, measured, 512)
    assert (found.provenance, found.chip, found.precision) == ("calibrated", "here", "Q4_1")
    for run, seconds in measured.items():
        assert predict(shape, Machine(machine().chip, found), run, 512) == pytest.approx(seconds, rel=0.05)
    assert found.linear == pytest.approx(0.11, rel=0.1)


def test_a_fit_finds_that_tiles_of_rows_pay(shape):
    """Seconds of a machine with AMX. From the usual start alone no fit comes nearer than a fifth."""
    measured = {
        Run(64): 0.02725,
        Run(512): 0.195,
        Run(24, 1): 0.08357,
        Run(24, 1, 768): 0.1162,
        Run(24, 4, 128): 0.1581,
        Run(24, 16, 128): 0.3639,
    }
    limits = {"read_bandwidth": 30.17e9, "int8": 10.96e12, "bf16": 2.457e12, "f32": 0.3383e12}
    chip = machine_table("here", limits, 24e9).chip()
    found = Machine(chip, fit(shape, chip, machine().efficiency, measured, 512))
    for run, seconds in {**measured, Run(24, 8, 128): 0.2637}.items():
        assert predict(shape, found, run, 512) == pytest.approx(seconds, rel=0.15)


def test_a_calibration_is_kept(tmp_path, shape):
    table = machine_table("here", LIMITS, 24e9)
    row = fit(shape, table.chip(), machine().efficiency, {Run(64): 0.1}, 512)
    path = tmp_path / "here.toml"
    path.write_text(to_toml(Calibration(chips=(table,), efficiencies=(row,))), encoding="utf-8")
    assert read_calibration(path) == Calibration(chips=(table,), efficiencies=(row,))
    path.write_text("[[efficiencies]]\nlinear = 2.0\n", encoding="utf-8")
    with pytest.raises(ScenarioError, match=r"efficiencies\[0\].linear must be at most 1"):
        read_calibration(path)


def test_the_closest_row(shape):
    row = replace(machine().efficiency, chip="here", architecture="dense", precision="Q8_0")
    other = replace(row, precision="Q4_1")
    assert closest(shape, "here", (row, other)) is other
    assert closest(shape, "here", (row,)) is row
    assert closest(shape, "there", (row,)) is None
    assert with_row((row, other), replace(other, linear=0.9)) == (row, replace(other, linear=0.9))


@pytest.fixture
def _quick_probe(monkeypatch):
    monkeypatch.setattr(benchmark, "_PROBED_BYTES", 2**22)
    monkeypatch.setattr(benchmark, "_PROBE_REPEATS", 1)


@pytest.mark.usefixtures("_quick_probe")
def test_command_line(run, fail, tmp_path):
    from tiny import TinyLlama, tiny_llama_gguf

    path = tiny_llama_gguf(tmp_path / "tiny.gguf", TinyLlama(max_position_embeddings=1024), "Q8_0")
    kept = tmp_path / "here.toml"
    first = run("plan", "here", path, "--repeat", 1, "--threads", 1, "--save", kept)
    assert first.exit_code == 0, first.stderr
    again = json.loads(
        run("plan", "here", path, "--repeat", 1, "--threads", 1, "--calibration", kept, "--json").stdout
    )
    assert again["efficiency"]["provenance"] == "calibrated"
    assert all(one["measured_tok_s"] > 0 for one in again["runs"])
    only = json.loads(run("plan", "here", path, "--threads", 1, "--predict", "--json").stdout)
    assert {one["measured_tok_s"] for one in only["runs"]} == {None}
    assert "--repeat must be at least 1" in fail("plan", "here", path, "--repeat", 0)
    assert "--save has nothing to write" in fail("plan", "here", path, "--predict", "--save", kept)
