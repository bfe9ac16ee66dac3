"""Adapters against transformers' models whose weights have them merged, and adapters that do not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from jinn.engine.config import EngineConfig
from jinn.engine.loading import load_runner
from jinn.engine.reference_runner import load_reference_runner
from jinn.weights.errors import WeightsError
from lora_folders import ALPHA, RANK, llama_linear_shapes, save_lora, write_lora
from native.compare import assert_close
from native.programs import packed_sequences
from tiny import TinyLlama, tiny_llama_folder, tiny_llama_gguf

from .gguf_models import gguf_of
from .transformers_models import BLOCK_SIZE, random_ids, random_model, state_slots

TOLERANCE = 1e-4
NUM_TOKENS = 40
VARIANTS = (
    "llama biased",
    "qwen2 untied",
    "qwen3 biased",
    "qwen3_moe some sparse",
    "qwen3_next untied",
    "qwen3_5 tied",
    "qwen3_5_moe untied",
    "deepseek_v3 untied",
)
NOT_ADAPTED = re.compile(r"lm_head|\.experts\.|kv_b_proj|mlp\.gate$")


def adapted_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every linear of the layers that may have an adapter."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not NOT_ADAPTED.search(name)
    }


def merged_logits(variant: str, tensors: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """transformers' logits of the model with `scale * B A` added to its weights."""
    model = random_model(variant)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, a in tensors.items():
            if "lora_A" in name:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[name.replace("lora_A", "lora_B")]
                modules[module].weight += scale * torch.from_numpy(b) @ torch.from_numpy(a)
        return model(torch.tensor([random_ids(NUM_TOKENS)])).logits[0].numpy()


def load(path, adapters, loader=load_runner):
    config = EngineConfig(
        str(path),
        num_threads=1,
        cache_memory=2**22,
        block_size=BLOCK_SIZE,
        kv_cache_dtype="f32",
        activations="f32",
        lora_adapters={name: str(folder) for name, folder in adapters.items()},
    )
    return loader(config, lambda loaded, total: None)


def logits_of(runner, adapters):
    """Of the same tokens, once for each adapter, in one batch; float32 [adapters, tokens, vocab_size]."""
    sequences = [(random_ids(NUM_TOKENS), NUM_TOKENS)] * len(adapters)
    batch = replace(packed_sequences(sequences), adapters=np.array(adapters, np.int32))
    logits = runner.logits(replace(batch, **state_slots(len(adapters))))
    return logits.reshape(len(adapters), NUM_TOKENS, -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_are_as_if_merged(tmp_path, variant):
    """Two adapters and the bare model in one batch, on the kernels and in torch."""
    from safetensors.numpy import load_file

    model = random_model(variant)
    model.save_pretrained(tmp_path / "model")
    shapes = adapted_shapes(model)
    some = dict(list(shapes.items())[::3])
    folders = {
        "all": write_lora(tmp_path / "all", shapes),
        "some": write_lora(tmp_path / "some", some, seed=1, use_rslora=True),
    }
    tensors = {name: load_file(folder / "adapter_model.safetensors") for name, folder in folders.items()}
    expected = [
        merged_logits(variant, tensors["some"], ALPHA / RANK**0.5),
        merged_logits(variant, {}, 0.0),
        merged_logits(variant, tensors["all"], ALPHA / RANK),
    ]
    assert np.abs(expected[0] - expected[1]).max() > 0.05
    for loader in (load_runner, load_reference_runner):
        runner, info = load(tmp_path / "model", folders, loader)
        assert [name for name, _ in info.adapters] == ["all", "some"]
        for logits, merged in zip(logits_of(runner, [1, -1, 0]), expected, strict=True):
            assert_close(logits, merged, TOLERANCE)


@pytest.mark.parametrize("variant", ["llama", "qwen3_5"])
def test_adapters_of_files_with_rows_and_columns_in_another_order(tmp_path, variant):
    variant = f"{variant} for llama.cpp"
    model = random_model(variant)
    model.save_pretrained(tmp_path / "model")
    file = gguf_of(tmp_path / "model", tmp_path / "model.gguf", "F32")
    folder = write_lora(tmp_path / "all", adapted_shapes(model))
    own, _ = load(tmp_path / "model", {"all": folder})
    gguf, _ = load(file, {"all": folder})
    assert_close(logits_of(gguf, [0])[0], logits_of(own, [0])[0], TOLERANCE)


def test_a_batch_without_adapters_has_the_bytes_of_a_model_without(tmp_path):
    path = tiny_llama_gguf(tmp_path / "tiny.gguf", format_name="Q4_0")
    bare, _ = load(path, {})
    adapted, _ = load(path, {"all": write_lora(tmp_path / "all", llama_linear_shapes())})
    assert logits_of(bare, [-1, -1]).tobytes() == logits_of(adapted, [-1, -1]).tobytes()
    mixed = logits_of(adapted, [-1, 0, -1])
    assert mixed[[0, 2]].tobytes() == logits_of(bare, [-1, -1]).tobytes()
    assert np.abs(mixed[1] - mixed[0]).max() > 0.05


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("variant", "module", "shape", "message"),
    [
        ("llama tied", "model.embed_tokens", (96, 64), "is not supported: adapters change linears of"),
        ("llama untied", "lm_head", (96, 64), "is not supported: adapters change linears of"),
        ("llama tied", "model.layers.3.self_attn.q_proj", (64, 64), "is none of the model's"),
        ("llama tied", "model.layers.0.self_attn.w_proj", (64, 64), "is none of the model's"),
        ("llama tied", Q_PROJ, (63, 64), r"is for a weight \[63, 64\], but the model's is \[64, 64\]"),
        ("llama tied", Q_PROJ, (64, 65), r"is for a weight \[64, 65\], but the model's is \[64, 64\]"),
        ("qwen3_moe untied", "model.layers.0.mlp.experts.1.up_proj", (24, 64), "is not supported"),
        ("qwen3_moe untied", "model.layers.0.mlp.gate", (8, 64), "is not supported"),
        ("deepseek_v3 untied", "model.layers.0.self_attn.kv_b_proj", (56, 16), "is not supported"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, variant, module, shape, message):
    random_model(variant).save_pretrained(tmp_path / "model")
    folder = write_lora(tmp_path / "bad", {module: shape})
    with pytest.raises(WeightsError, match=rf"bad: module '{re.escape(module)}' {message}"):
        load(tmp_path / "model", {"bad": folder})


def test_a_broken_adapter_ends_the_start_before_weights_are_read(tmp_path):
    tiny_llama_folder(tmp_path / "model", TinyLlama())
    folder = save_lora(tmp_path / "bad", {"peft_type": "LORA"}, {"x": np.zeros(1, np.float32)})
    config = EngineConfig(str(tmp_path / "model"), lora_adapters={"bad": str(folder)})
    with pytest.raises(WeightsError, match=r"bad/adapter_config.json: r must be an integer"):
        load_runner(config, lambda loaded, total: pytest.fail("weights were read"))
