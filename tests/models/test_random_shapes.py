"""Random small shapes of each family with states or latents, against transformers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jinn.engine.loading import load_runner
from jinn.engine.reference_runner import load_reference_runner

from .gguf_models import gguf_of
from .test_families import NATIVE_TOLERANCE, REFERENCE_TOLERANCE, load
from .transformers_models import (
    HYBRID_FAMILIES,
    SMALL,
    all_logits,
    random_ids,
    randomize,
    transformers_logits,
)

NUM_TOKENS = 70


def random_config(family, rng):
    """Sizes that no kernel is at ease with: odd group counts, widths beside the multiples of its tiles."""
    experts = rng.choice([2, 4, 8, 12])
    chosen = rng.randint(1, experts)
    common = {
        **SMALL,
        "vocab_size": rng.choice([96, 97, 130]),
        "hidden_size": rng.choice([32, 48, 68]),
        "intermediate_size": rng.choice([24, 40]),
        "num_hidden_layers": rng.randint(1, 5),
        "tie_word_embeddings": rng.random() < 0.5,
        "rms_norm_eps": 1e-3,
        "moe_intermediate_size": rng.choice([4, 20, 36]),
        "num_experts_per_tok": chosen,
    }
    if family == "deepseek_v3":
        groups = rng.choice([n for n in (1, 2, 4) if (experts % n == 0 and experts // n >= 2) or n == 1])
        allowed = rng.randint(1, groups)
        rope_dim = rng.choice([4, 8])
        heads = rng.choice([1, 3, 4])
        return {
            **common,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "qk_nope_head_dim": rng.choice([4, 8, 12]),
            "qk_rope_head_dim": rope_dim,
            "head_dim": rope_dim,
            "v_head_dim": rng.choice([4, 10, 16]),
            "q_lora_rank": rng.choice([8, 20]),
            "kv_lora_rank": rng.choice([8, 16, 36]),
            "first_k_dense_replace": rng.randint(0, 2),
            "n_routed_experts": experts,
            "num_experts_per_tok": min(chosen, allowed * (experts // groups)),
            "n_shared_experts": rng.randint(1, 3),
            "n_group": groups,
            "topk_group": allowed,
        }
    mixture = {"num_experts": experts, "shared_expert_intermediate_size": rng.choice([4, 28])}
    kinds = ["full_attention", *rng.choices(["linear_attention", "full_attention"], [3, 1], k=4)]
    kinds = kinds[: common["num_hidden_layers"]]
    rng.shuffle(kinds)
    key_heads = rng.choice([1, 2, 3])
    heads = rng.choice([1, 2])
    return {
        **common,
        "num_attention_heads": heads * rng.choice([1, 3]),
        "num_key_value_heads": heads,
        "head_dim": rng.choice([8, 16, 24]),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * rng.choice([1, 2, 5]),
        "linear_key_head_dim": rng.choice([4, 8, 20]),
        "linear_value_head_dim": rng.choice([4, 12, 16]),
        "linear_conv_kernel_dim": rng.choice([2, 3, 4]),
        "layer_types": kinds,
        **({} if family == "qwen3_5_text" else mixture),
    }


def check(family, seed, folder):
    rng = random.Random(seed)
    config = random_config(family, rng)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **config), attn_implementation="eager"
    )
    randomize(model.float().eval(), is_offset=family in HYBRID_FAMILIES)
    model.save_pretrained(folder / "hf")
    ids = random_ids(NUM_TOKENS, config["vocab_size"], seed)
    expected = transformers_logits(folder / "hf", ids)
    paths = [folder / "hf", gguf_of(folder / "hf", folder / "model.gguf")]
    for loader, tolerance in ((load_reference_runner, REFERENCE_TOLERANCE), (load_runner, NATIVE_TOLERANCE)):
        for path in paths:
            error = np.abs(all_logits(load(loader, path), ids) - expected).max()
            assert error <= 4 * tolerance, (config, path.name)


FAMILIES = pytest.mark.parametrize("family", [*HYBRID_FAMILIES, "deepseek_v3"])


@FAMILIES
@pytest.mark.parametrize("seed", range(4))
def test_logits(family, seed, tmp_path):
    check(family, seed, tmp_path)


@pytest.mark.soak
@FAMILIES
@pytest.mark.parametrize("seed", range(4, 40))
def test_many_logits(family, seed, tmp_path):
    check(family, seed, tmp_path)
