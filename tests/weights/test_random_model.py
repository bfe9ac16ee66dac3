"""Random models of published shapes: what their files hold, and that they run."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer

from jinn.engine.config import EngineConfig
from jinn.engine.loading import load_runner
from jinn.frontend import load_frontend
from jinn.models import presets
from jinn.weights.block_formats import FORMAT_BY_NAME
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.file_types import GGUF_TYPES
from jinn.weights.quantize import dequantize
from jinn.weights.random_blocks import random_blocks
from jinn.weights.random_model import write_random
from jinn.weights.synthetic_tokenizer import synthetic_tokenizer
from models.transformers_models import BLOCK_SIZE, all_logits, random_ids, transformers_logits

# cut down where it does not matter: as many heads and experts, but narrow
SMALL = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
SMALL |= {"q_lora_rank": 32, "kv_lora_rank": 32, "shared_expert_intermediate_size": 32}
FAMILIES = {
    "SmolLM2-135M": 2,
    "Qwen3-0.6B": 2,
    "Qwen3-30B-A3B": 2,
    "Qwen3-Next-80B-A3B": 4,
    "Qwen3.5-4B": 4,
    "Qwen3.5-35B-A3B": 4,
    "DeepSeek-V3": 4,
}


VOCAB_SIZE = 1400


def narrow(shape, num_layers=1):
    """A published shape with few columns and words, so that it is written and run in a moment."""
    config = presets.preset_config(shape, num_layers)
    sizes = {key: min(size, config[key]) for key, size in SMALL.items() if key in config}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if "head_dim" in config else {}
    experts = {key: 16 for key in ("num_experts", "n_routed_experts") if key in config}
    return {**config, **sizes, **heads, **experts, "vocab_size": VOCAB_SIZE, "pad_token_id": None}


def logits_of(path, ids):
    settings = {"activations": "f32", "kv_cache_dtype": "f32", "num_threads": 1, "cache_memory": 2**24}
    config = EngineConfig(str(path), block_size=BLOCK_SIZE, **settings)
    return all_logits(load_runner(config, lambda loaded, total: None)[0], ids)


@pytest.mark.parametrize("shape", FAMILIES)
@pytest.mark.parametrize("target", ["model.gguf", "folder"])
def test_logits_are_of_many_tokens_and_depend_on_the_text(tmp_path, shape, target):
    write_random(shape, narrow(shape, FAMILIES[shape]), tmp_path / target, "f32")
    logits = logits_of(tmp_path / target, random_ids(40, 500))
    assert np.isfinite(logits).all()
    assert 0.2 < logits.std(axis=1).min() <= logits.std(axis=1).max() < 10
    assert logits.std(axis=0).mean() > 0.1  # from one position to the next
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert (probabilities / probabilities.sum(axis=1, keepdims=True)).max() < 0.9


@pytest.mark.parametrize("shape", FAMILIES)
def test_transformers_runs_a_folder(tmp_path, shape):
    write_random(shape, narrow(shape, FAMILIES[shape]), tmp_path / "folder", "bf16")
    ids = random_ids(20, 500)
    expected = transformers_logits(tmp_path / "folder", ids)
    assert np.abs(logits_of(tmp_path / "folder", ids) - expected).max() <= 2e-3


@pytest.mark.parametrize("type_name", GGUF_TYPES)
def test_a_block_has_the_spread_that_is_asked_for(type_name):
    block_format = FORMAT_BY_NAME[type_name.upper()]
    num_blocks = (1 << 17) // block_format.block_elems
    data = random_blocks(np.random.default_rng(0), block_format, num_blocks, 0.05)
    values = dequantize(data, block_format, (1 << 17,))
    assert values.std() == pytest.approx(0.05, rel=0.02)
    assert abs(values.mean()) < 0.05 / 50


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed, threads in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        target = tmp_path / f"{name}.gguf"
        write_random("m", narrow("Qwen3.5-35B-A3B", 4), target, seed=seed, num_threads=threads)
    a, b, c = ((tmp_path / f"{name}.gguf").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_tensors_differ(tmp_path):
    write_random("m", narrow("Qwen3-0.6B", 3), tmp_path / "m.gguf")
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        contents = [bytes(checkpoint.data(name)) for name in checkpoint.tensors]
        assert len(set(contents)) == len(contents)


@pytest.mark.parametrize("shape", FAMILIES)
def test_the_published_vocabulary(shape):
    model = presets.preset(shape)
    metadata = synthetic_tokenizer(model.family, model.vocab_size)
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    assert len(tokens) == len(set(tokens)) == model.vocab_size
    config = presets.preset_config(shape)
    assert metadata.get("tokenizer.ggml.bos_token_id") == config.get("bos_token_id")
    assert tokens[config["eos_token_id"]].startswith("<")
    assert set(tokens) >= {merge.replace(" ", "") for merge in merges}


@pytest.mark.parametrize("shape", FAMILIES)
def test_the_tokenizer_of_a_file_and_of_a_folder(tmp_path, shape):
    write_random(shape, narrow(shape), tmp_path / "folder")
    write_random(shape, narrow(shape), tmp_path / "model.gguf")
    one, other = (load_frontend(tmp_path / name) for name in ("model.gguf", "folder"))
    text = "hello wide world, 2026: über <think>"
    ids = one.tokenizer.encode(text)
    assert one.tokenizer.decode(ids, skip_special=False) == text
    assert other.tokenizer.encode(text) == ids
    library = FastTokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    assert library.encode(text, add_special_tokens=False).ids == ids
    assert one.tokenizer.eos_token_ids == other.tokenizer.eos_token_ids
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert one.encode_chat(chat) == other.encode_chat(chat)
    assert set(one.encode_chat(chat)) & one.tokenizer.special_ids


def test_all_types_are_written(tmp_path):
    for type_name in GGUF_TYPES:
        write_random("m", narrow("Qwen3-0.6B"), tmp_path / "m.gguf", type_name, overwrite=True)
        with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.check_finite(name)
    with pytest.raises(WeightsError, match="type 'q4_0' is not one of f32, f16, bf16"):
        write_random("m", narrow("Qwen3-0.6B"), tmp_path / "folder", "q4_0")
