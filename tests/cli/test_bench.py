from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from jinn.cli.bench import Shares, Workload
from jinn.engine import benchmark
from jinn.engine.benchmark import Limits
from jinn.models.costs import costs
from jinn.models.registry import model_of
from jinn.weights.checkpoint import open_checkpoint

SMALL = ["--prompt-tokens", 20, "--generate-tokens", 3, "--batch", "1,3", "--repeat", 2, "--threads", 1]


@pytest.fixture(autouse=True)
def _quick_probe(monkeypatch):
    monkeypatch.setattr(benchmark, "_PROBED_BYTES", 2**22)
    monkeypatch.setattr(benchmark, "_PROBE_REPEATS", 1)


def test_json_is_one_object(run, tiny_path):
    result = run("bench", tiny_path, *SMALL, "--json")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert report["model"] == "tiny.gguf"
    assert (report["threads"], report["repeat"], report["depth"]) == (1, 2, 0)
    assert (report["prompt_tokens"], report["generate_tokens"], report["batch_sizes"]) == (20, 3, [1, 3])
    assert report["isa"]
    assert report["prefill_tok_s"] > 0
    assert list(report["decode_tok_s"]) == list(report["samples"]["decode_tok_s"]) == ["1", "3"]
    assert [len(samples) for samples in report["samples"]["decode_tok_s"].values()] == [2, 2]
    assert report["prefill_tok_s"] == pytest.approx(sum(report["samples"]["prefill_tok_s"]) / 2)
    assert set(report["limits"]) == {"read_bandwidth", "int8", "bf16", "f32"}
    assert all(limit > 1e8 for limit in report["limits"].values())
    for share in (report["shares"]["prefill"], *report["shares"]["decode"].values()):
        assert share["bandwidth"] > 0
        assert share["compute"] > 0


def test_table(run, tiny_path):
    lines = run("bench", tiny_path, *SMALL, "--depth", 4).stdout.splitlines()
    assert lines[0].startswith("tiny.gguf: ")
    assert [line.split("  ")[0] for line in lines[2:5]] == [
        "prefill 20",
        "decode 3 at depth 4, batch 1",
        "decode 3 at depth 4, batch 3",
    ]
    assert lines[5].startswith("limits: reads ")


def test_more_sequences_than_a_step_or_the_server_takes(run, tiny_path):
    result = run("bench", tiny_path, *SMALL, "--batch", 600, "--depth", 30, "--repeat", 1, "--json")
    assert json.loads(result.stdout)["decode_tok_s"]["600"] > 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--batch", "1,x"], "--batch must be numbers"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--prompt-tokens", 0], "--prompt-tokens must be at least 1"),
        (["--depth", -1], "--depth must be at least 0"),
        (["--repeat", 0], "--repeat must be at least 1"),
        (["--depth", 250, "--generate-tokens", 7], "257 tokens are more than the model's 256"),
    ],
)
def test_refused(fail, tiny_path, options, error):
    assert error in fail("bench", tiny_path, *SMALL, *options)


def test_shares_by_hand(tiny_path):
    with open_checkpoint(tiny_path) as checkpoint:
        model_costs = costs(model_of(checkpoint), checkpoint)
    limits = Limits(read_bandwidth=1e9, int8=4e9, bf16=2e9, f32=1e9)
    shares = Shares(limits, model_costs, kv_bytes_per_token=100)
    workload = Workload(20, 3, 4, (5,), 1)
    share = shares.decode(
        5, workload, tok_s=50.0
    )  # a step of five tokens takes 0.1 s, at 6 tokens of context
    num_bytes = model_costs.weight_bytes + 5 * 6 * 100
    assert share["bandwidth"] == pytest.approx(num_bytes / 1e9 / 0.1)
    assert share["compute"] == pytest.approx(5 * sum(model_costs.operations(1, 6, 1).values()) / 1e9 / 0.1)
    assert shares.prefill(600, tok_s=600.0)["bandwidth"] == pytest.approx(2 * model_costs.weight_bytes / 1e9)


def test_probe_measures_what_the_machine_can_do():
    from jinn import _native

    limits = benchmark.probe(1, _native.choose_kernels(""))
    assert all(value > 1e8 for value in asdict(limits).values())
