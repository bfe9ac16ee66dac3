"""Tiny random models made by transformers: the other implementation that jinn's is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from jinn.engine.runner import Runner
from jinn.ops.protocol import Batch

logging.disable_progress_bar()

BLOCK_SIZE = 16
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA_CPP = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "head_dim": 64,
}
"""A shape that llama.cpp runs, in its block formats too."""
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
OWN_YARN_ROPE = {**YARN_ROPE, "attention_factor": 1.2, "beta_fast": 4.0, "beta_slow": 0.5}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama untied": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama wide heads": ("llama", {"head_dim": 40, "num_key_value_heads": 1}),
    "llama one group": (
        "llama",
        {"num_key_value_heads": 4, "head_dim": 12, "hidden_size": 48, "rms_norm_eps": 1e-6},
    ),
    "llama theta": ("llama", THETA),
    "llama for llama.cpp": ("llama", LLAMA_CPP),
    "qwen2 untied": ("qwen2", THETA),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen2 for llama.cpp": ("qwen2", LLAMA_CPP),
    "qwen3 untied": ("qwen3", THETA),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32, "rms_norm_eps": 1e-6}),
    "qwen3 biased": ("qwen3", {"attention_bias": True}),
    "qwen3 groups of three": ("qwen3", {"num_attention_heads": 6, "head_dim": 24}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN_ROPE}),
    "qwen3 own yarn": ("qwen3", {"rope_parameters": OWN_YARN_ROPE}),
    "qwen3 for llama.cpp": ("qwen3", LLAMA_CPP),
    "qwen3 yarn for llama.cpp": ("qwen3", {**LLAMA_CPP, "rope_parameters": YARN_ROPE}),
    "qwen3_moe untied": ("qwen3_moe", {**THETA, **EXPERTS}),
    "qwen3_moe biased": ("qwen3_moe", {**EXPERTS, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3_moe as they are": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": False}),
    "qwen3_moe for llama.cpp": ("qwen3_moe", {**LLAMA_CPP, **EXPERTS, "moe_intermediate_size": 256}),
}


def random_model(variant: str, seed: int = 0) -> PreTrainedModel:
    """float32, eager, and nothing left at its trivial initial value: norms are not 1, biases not 0."""
    family, changes = VARIANTS[variant]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith(".bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


def transformers_logits(path: Path, token_ids: list[int]) -> np.ndarray:
    """float32 logits [tokens, vocab_size] of a saved model, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.tensor([token_ids])).logits[0].numpy()


def random_ids(count: int, vocab_size: int = SMALL["vocab_size"], seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def all_logits(runner: Runner, token_ids: list[int], start: int = 0) -> np.ndarray:
    """Logits of the tokens at positions `start` and on, of a sequence in the cache's first blocks."""
    end = len(token_ids)
    return runner.logits(
        Batch(
            np.array(token_ids[start:], np.int32),
            np.arange(start, end, dtype=np.int32),
            np.array([0, end - start], np.int32),
            np.array([end], np.int32),
            np.arange(-(-end // runner.block_size), dtype=np.int32)[None],
            np.arange(end - start, dtype=np.int32),
        )
    )
