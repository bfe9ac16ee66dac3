"""GGUF's names of parameters, as llama.cpp's converter gives them."""

from __future__ import annotations

from collections.abc import Mapping

TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
LEAVES = {
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
}
PREDICTION = {
    "mtp.fc": "nextn.eh_proj",
    "mtp.pre_fc_norm_embedding": "nextn.enorm",
    "mtp.pre_fc_norm_hidden": "nextn.hnorm",
    "mtp.norm": "nextn.shared_head_norm",
}


def gguf_name(parameter: str, num_hidden_layers: int, renamed: Mapping[str, str]) -> str:
    """Of a parameter by jinn's name; `renamed` has the modules of a layer that a family calls otherwise.

    The multi-token prediction module counts as the block after the last.
    """
    module, _, leaf = parameter.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    if module in PREDICTION:
        return f"blk.{num_hidden_layers}.{PREDICTION[module]}.{leaf}"
    layer, part = layer_and_part(parameter, num_hidden_layers)
    if part in LEAVES:
        return f"blk.{layer}.{LEAVES[part]}"
    module = part.rpartition(".")[0]
    return f"blk.{layer}.{renamed.get(module) or LAYER[module]}.{leaf}"


def layer_and_part(parameter: str, num_hidden_layers: int) -> tuple[int, str]:
    """`model.layers.3.mlp.gate.weight` is 3 and `mlp.gate.weight`; `mtp.layers.0` follows the last layer.

    Raises ValueError for a parameter of no layer.
    """
    for prefix, first in (("model.layers.", 0), ("mtp.layers.", num_hidden_layers)):
        if parameter.startswith(prefix):
            number, _, part = parameter.removeprefix(prefix).partition(".")
            return first + int(number), part
    raise ValueError(f"parameter {parameter!r} is of no layer")
