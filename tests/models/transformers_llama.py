"""Tiny random llamas made by transformers: the other implementation that jinn's is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
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
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "wide heads": {"head_dim": 40, "num_key_value_heads": 1},
    "one group": {"num_key_value_heads": 4, "head_dim": 12, "hidden_size": 48, "rms_norm_eps": 1e-6},
    "old rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}


def random_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """float32, eager, and nothing left at its trivial initial value: norms are not 1, biases not 0."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **config}, attn_implementation="eager")).eval()
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
