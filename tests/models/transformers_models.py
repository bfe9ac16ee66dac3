"""Tiny random models made by transformers: the other implementation that jinn's is compared with."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
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
HYBRID = {
    "rms_norm_eps": 1e-3,  # a state's output is often small, and its norm would show all rounding
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 20}
HYBRID_LLAMA_CPP = {
    **LLAMA_CPP,
    **HYBRID,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}
MLA = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,  # of what is rotated
    "v_head_dim": 6,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
MLA_LLAMA_CPP = {
    **MLA,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "head_dim": 32,
    "v_head_dim": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 256,
    "rms_norm_eps": 1e-6,
}
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
    "qwen3_moe some sparse": (
        "qwen3_moe",
        {**EXPERTS, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen3_moe for llama.cpp": ("qwen3_moe", {**LLAMA_CPP, **EXPERTS, "moe_intermediate_size": 256}),
    "qwen3_next untied": ("qwen3_next", {**THETA, **HYBRID, **SHARED_EXPERT}),
    "qwen3_next one group": (
        "qwen3_next",
        {**HYBRID, **SHARED_EXPERT, "linear_num_value_heads": 2, "num_hidden_layers": 3}
        | {"layer_types": ["full_attention", "linear_attention", "linear_attention"]},
    ),
    "qwen3_next for llama.cpp": ("qwen3_next", {**EXPERTS, **HYBRID_LLAMA_CPP}),
    "qwen3_5 tied": ("qwen3_5_text", {**THETA, **HYBRID, "tie_word_embeddings": True}),
    "qwen3_5 for llama.cpp": ("qwen3_5_text", HYBRID_LLAMA_CPP),
    "qwen3_5_moe untied": ("qwen3_5_moe_text", {**THETA, **HYBRID, **SHARED_EXPERT}),
    "qwen3_5_moe for llama.cpp": ("qwen3_5_moe_text", {**EXPERTS, **HYBRID_LLAMA_CPP}),
    "deepseek_v3 untied": ("deepseek_v3", MLA),
    "deepseek_v3 plain": (
        "deepseek_v3",
        {**MLA, **THETA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False}
        | {"norm_topk_prob": False, "attention_bias": True, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3 for llama.cpp": ("deepseek_v3", MLA_LLAMA_CPP),
}


HYBRID_FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def random_model(variant: str, seed: int = 0) -> PreTrainedModel:
    """float32, eager, and nothing left at its trivial initial value: norms are not 1, biases not 0."""
    family, changes = VARIANTS[variant]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **deepcopy({**SMALL, **changes}))  # it writes into what it is given
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomize(model, is_offset=family in HYBRID_FAMILIES)
    return model


def randomize(module: nn.Module, *, is_offset: bool) -> None:
    """All parameters and buffers. `is_offset`: norms scale by 1 + weight, but for the DeltaNet's.

    A DeltaNet's outputs are small, and their norm multiplies rounding errors: its blocks add less.
    """
    with torch.no_grad():
        for name, parameter in (*module.named_parameters(), *module.named_buffers()):
            if name.endswith("norm.weight"):
                is_about_zero = is_offset and not name.endswith("linear_attn.norm.weight")
                parameter.copy_((not is_about_zero) + 0.2 * torch.randn_like(parameter))
            elif name.endswith("A_log"):
                parameter.copy_(0.5 + 0.5 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif "inv_freq" not in name:
                is_calmed = is_offset and name.endswith(("out_proj.weight", "down_proj"))
                scale = (0.4 if is_calmed else 1.0) / parameter.shape[-1] ** 0.5
                parameter.copy_(scale * torch.randn_like(parameter))


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
            **state_slots(1),
        )
    )


def state_slots(num_seqs: int) -> dict[str, np.ndarray]:
    """Those fields of a batch: a slot for each sequence, and no drafts. Models without states ignore them."""
    none = np.zeros(num_seqs, np.int32)
    return {"state_slots": np.arange(num_seqs, dtype=np.int32), "num_drafts": none, "num_accepted": none}
