"""What is easily got wrong in Qwen3-Next, Qwen3.5 and DeepSeek-V3: each fault must show in the logits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from jinn.models.deepseek_v3 import DeepseekV3
from jinn.models.qwen3_5 import Qwen35
from jinn.models.qwen3_next import Qwen3Next
from jinn.models.rope import plain_frequencies
from jinn.ops.protocol import Routing, StateSpec
from jinn.ops.reference import ReferenceOps

from .gguf_models import gguf_of
from .test_families import LIMIT, REFERENCE_TOLERANCE, as_family, load_parameters, reference_error
from .transformers_models import random_ids, random_model, transformers_logits

NEXT, DENSE, MOE = "qwen3_next untied", "qwen3_5 tied", "qwen3_5_moe untied"
LATENT, PLAIN_LATENT = "deepseek_v3 untied", "deepseek_v3 plain"
HYBRIDS, MIXTURES = (NEXT, DENSE, MOE), (NEXT, MOE)
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")

    @cache
    def save(variant, is_gguf=False):
        if is_gguf:
            return gguf_of(save(variant), folder / f"{variant}.gguf")
        random_model(variant).save_pretrained(folder / variant)
        return folder / variant

    return save


@cache
def expected_logits(path):
    return transformers_logits(path, random_ids(NUM_TOKENS))


class PlainNorms(Qwen3Next):
    norm_offset = 0.0


class OffsetEverywhere(ReferenceOps):
    """1 + weight in the DeltaNet's norm too."""

    def rms_norm(self, x, node, eps, offset=0.0):
        return super().rms_norm(x, node, eps, 1.0)


class HalvedGate(ReferenceOps):
    """Queries in the first half of q_proj's rows and gates in the second, not head by head."""

    def split_heads(self, x, num_heads, widths):
        return x.chunk(2, dim=-1) if len(widths) == 2 else super().split_heads(x, num_heads, widths)


class NoGate(ReferenceOps):
    def sigmoid_mul(self, x, gate):
        return x if gate.shape[1] > 1 else super().sigmoid_mul(x, gate)


class NoSharedGate(ReferenceOps):
    def sigmoid_mul(self, x, gate):
        return x if gate.shape[1] == 1 else super().sigmoid_mul(x, gate)


class GateBeforeNorm(ReferenceOps):
    """The DeltaNet's output gated, then normed."""

    def linear(self, x, nodes, ctx):
        outputs = super().linear(x, nodes, ctx)
        self.gate = outputs[1] if len(outputs) == 4 else None  # q, k and v together; z; b; a
        return outputs

    def rms_norm(self, x, node, eps, offset=0.0):
        return super().rms_norm(x if offset else functional.silu(self.gate) * x, node, eps, offset)

    def silu_mul(self, gate, up):
        return up if gate is self.gate else super().silu_mul(gate, up)


class TiledValueHeads(ReferenceOps):
    """Value head h with key head h % num_key_heads."""

    def gated_delta_rule(self, qkv, a, b, node, ctx, spec):
        cols, group = spec.num_key_heads * spec.key_dim, spec.num_value_heads // spec.num_key_heads
        q, k, v = qkv[:, :cols], qkv[:, cols : 2 * cols], qkv[:, 2 * cols :]
        heads = spec.num_value_heads
        wide = StateSpec(heads, heads, spec.key_dim, spec.value_dim, spec.conv_kernel)
        tiled = torch.cat((q.repeat(1, group), k.repeat(1, group), v), 1)
        return super().gated_delta_rule(tiled, a, b, node, ctx, wide)


class Rule(ReferenceOps):
    """The delta rule of one sequence again, with its parts to be got wrong."""

    eps, query_scale, rate_scale = 1e-6, None, 1.0
    decays_first = reads_updated = True

    def gated_delta_rule(self, qkv, a, b, node, ctx, spec):
        cols, group = spec.num_key_heads * spec.key_dim, spec.num_value_heads // spec.num_key_heads
        q, k, v = (
            x.reshape(len(x), -1, spec.key_dim) for x in qkv.split((cols, cols, qkv.shape[1] - 2 * cols), 1)
        )
        q, k = (self.normed(x).repeat_interleave(group, 1) for x in (q, k))
        q = q * (self.query_scale or spec.key_dim**-0.5)
        decay = self.decay(a, node).exp()[..., None, None]
        state, outputs = torch.zeros(spec.num_value_heads, spec.key_dim, spec.value_dim), []
        for t in range(len(q)):
            before = state
            state = state * decay[t] if self.decays_first else state
            delta = (
                self.rate_scale * b[t].sigmoid()[:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            )
            state = state + k[t][..., None] * delta[:, None]
            state = state if self.decays_first else state * decay[t]
            outputs.append(torch.einsum("hkv,hk->hv", state if self.reads_updated else before, q[t]))
        return torch.stack(outputs).flatten(1)

    def normed(self, x):
        return x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt()

    def decay(self, a, node):
        return -node.A_log.exp() * functional.softplus(a + node.dt_bias)


def rule(**changes):
    return type("FaultyRule", (Rule,), changes)


class MeanNormedRule(Rule):
    def normed(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class DecayWithoutBias(Rule):
    def decay(self, a, node):
        return -node.A_log.exp() * functional.softplus(a)


class DecayOfLogs(Rule):
    def decay(self, a, node):
        return -node.A_log.abs() * functional.softplus(a + node.dt_bias)


class ReversedTaps(ReferenceOps):
    """The convolution's first tap on the newest input."""

    def causal_conv1d(self, x, node, ctx, spec):
        return super().causal_conv1d(x, SimpleNamespace(weight=node.weight.flip(1)), ctx, spec)


class ValuesFirst(ReferenceOps):
    """The convolution over v, q and k instead of q, k and v."""

    def causal_conv1d(self, x, node, ctx, spec):
        shifted = SimpleNamespace(weight=node.weight.roll(spec.num_value_heads * spec.value_dim, 0))
        return super().causal_conv1d(x, shifted, ctx, spec)


class ShortTail(ReferenceOps):
    """The convolution sees one input fewer."""

    def causal_conv1d(self, x, node, ctx, spec):
        weight = node.weight.clone()
        weight[:, 0] = 0
        return super().causal_conv1d(x, SimpleNamespace(weight=weight), ctx, spec)


class BiasInWeights(ReferenceOps):
    """Experts weighted by what chose them."""

    def route(self, x, node, spec):
        routing = super().route(x, node, spec)
        weights = (routing.scores + node.e_score_correction_bias).gather(1, routing.ids)
        return Routing(routing.ids, spec.scaling * weights / weights.sum(1, keepdim=True), routing.scores)


class NoBias(ReferenceOps):
    """Experts chosen by their scores alone."""

    def route(self, x, node, spec):
        return super().route(x, SimpleNamespace(weight=node.weight), spec)


class BestOfGroup(ReferenceOps):
    """A group counts as its best expert, not the sum of its two best."""

    def route(self, x, node, spec):
        scores = (x @ node.weight.T).sigmoid()
        groups = (scores + node.e_score_correction_bias).reshape(len(x), spec.num_groups, -1)
        best = groups.amax(-1).topk(spec.num_chosen_groups).indices
        allowed = torch.full_like(groups[..., 0], float("-inf")).scatter(1, best, 0.0)
        ids = (groups + allowed[..., None]).flatten(1).topk(spec.num_experts_per_tok).indices
        weights = scores.gather(1, ids)
        return Routing(ids, spec.scaling * weights / weights.sum(1, keepdim=True), scores)


class RopeFirst(ReferenceOps):
    """A head's rotated columns before the others."""

    def split_heads(self, x, num_heads, widths):
        first, second = super().split_heads(x, num_heads, widths[::-1])
        return second, first


class UnrotatedKey(ReferenceOps):
    def rope(self, x, ctx, rope, num_heads):
        return x if num_heads == 1 else super().rope(x, ctx, rope, num_heads)


class UnnormedLatent(ReferenceOps):
    """The latent as it is projected; other norms of its width there are none."""

    def rms_norm(self, x, node, eps, offset=0.0):
        return x if len(node.weight) == 16 else super().rms_norm(x, node, eps, offset)


def of_model(**changes):
    return lambda model: replace(model, **changes)


def of_rope(**changes):
    return lambda model: replace(model, rope=replace(model.rope, **changes))


def of_route(**changes):
    return lambda model: replace(
        model, mixture=replace(model.mixture, route=replace(model.mixture.route, **changes))
    )


def as_other(family):
    return lambda model: as_family(family, model)


def without_yarn_scale(model):
    return replace(model, softmax_scale=model.head_dim**-0.5)


def full_rotation(model):
    return replace(model, rope=replace(model.rope, inv_freq=frequencies(model, model.head_dim)))


def partial_of_full_rotation(model):
    """Frequencies over the whole head, cut to the rotated part."""
    num_pairs = len(model.rope.inv_freq)
    return replace(model, rope=replace(model.rope, inv_freq=frequencies(model, model.head_dim)[:num_pairs]))


def frequencies(model, rotary_dim):
    theta = 1 / model.rope.inv_freq[1] ** len(model.rope.inv_freq)
    return tuple(plain_frequencies(theta, rotary_dim).tolist())


MODEL_FAULTS = {
    "norms without + 1": (HYBRIDS, as_other(PlainNorms)),
    "rope style": (
        (*HYBRIDS, LATENT),
        lambda model: of_rope(is_interleaved=not model.rope.is_interleaved)(model),
    ),
    "rope over the whole head": (HYBRIDS, full_rotation),
    "frequencies of the whole head": (HYBRIDS, partial_of_full_rotation),
    "attention factor": ((*HYBRIDS, LATENT), of_rope(attention_factor=1.05)),
    "norm eps": ((*HYBRIDS, LATENT), of_model(rms_norm_eps=1e-2)),
    "weights as they are": ((*MIXTURES, LATENT), of_route(is_renormalized=False)),
    "scores": (MIXTURES, of_route(scoring="sigmoid")),
    "softmax scores": ((LATENT,), of_route(scoring="softmax")),
    "no groups": ((LATENT,), of_route(num_groups=1, num_chosen_groups=1)),
    "one group more": ((LATENT,), of_route(num_chosen_groups=3)),
    "scaling missing": ((LATENT, PLAIN_LATENT), of_route(scaling=1.0)),
    "scale without m^2": ((LATENT,), without_yarn_scale),
    "scale of the latent": ((LATENT, PLAIN_LATENT), of_model(softmax_scale=20**-0.5)),
}
OPS_FAULTS = {
    "1 + weight everywhere": (HYBRIDS, OffsetEverywhere),
    "gate before norm": (HYBRIDS, GateBeforeNorm),
    "gate split in halves": (HYBRIDS, HalvedGate),
    "gate missing": (HYBRIDS, NoGate),
    "shared gate missing": (MIXTURES, NoSharedGate),
    "head map": (HYBRIDS, TiledValueHeads),
    "decay after the update": (HYBRIDS, rule(decays_first=False)),
    "output before the update": (HYBRIDS, rule(reads_updated=False)),
    "l2norm eps": (HYBRIDS, rule(eps=1e-2)),
    "l2norm of the mean": (HYBRIDS, MeanNormedRule),
    "query unscaled": (HYBRIDS, rule(query_scale=1.0)),
    "rate doubled": (HYBRIDS, rule(rate_scale=2.0)),
    "decay without its bias": (HYBRIDS, DecayWithoutBias),
    "A_log not exponentiated": (HYBRIDS, DecayOfLogs),
    "taps reversed": (HYBRIDS, ReversedTaps),
    "convolution order": (HYBRIDS, ValuesFirst),
    "convolution tail": (HYBRIDS, ShortTail),
    "router bias as weight": ((LATENT,), BiasInWeights),
    "router bias left out": ((LATENT,), NoBias),
    "group score": ((LATENT,), BestOfGroup),
    "rotated columns first": ((LATENT, PLAIN_LATENT), RopeFirst),
    "latent not normed": ((LATENT, PLAIN_LATENT), UnnormedLatent),
    "key not rotated": ((LATENT, PLAIN_LATENT), UnrotatedKey),
}
# parameters that change places
EXCHANGES = {
    "b and a": (HYBRIDS, "linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight"),
    "A_log and dt_bias": (HYBRIDS, "linear_attn.A_log", "linear_attn.dt_bias"),
    "experts' gate and up": ((*MIXTURES, LATENT), "experts.gate_proj.weight", "experts.up_proj.weight"),
    "MLP's gate and up": ((DENSE,), "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "norms of q and k": (HYBRIDS, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    "norms of a block": ((*HYBRIDS, LATENT), "input_layernorm.weight", "post_attention_layernorm.weight"),
}


def cases(table):
    return [
        pytest.param(variant, fault, id=f"{fault}-{variant}")
        for fault in table
        for variant in table[fault][0]
    ]


def error_of(path, ops=None, change=lambda model: model):
    model, parameters = load_parameters(path)
    return reference_error(change(model), parameters, ops or ReferenceOps(), expected_logits(path))


@pytest.mark.parametrize("variant", [*HYBRIDS, LATENT, PLAIN_LATENT])
def test_without_a_fault_there_is_none(saved, variant):
    assert error_of(saved(variant)) <= REFERENCE_TOLERANCE


@pytest.mark.parametrize("variant", HYBRIDS)
def test_the_rule_to_be_got_wrong_is_right(saved, variant):
    assert error_of(saved(variant), Rule()) <= REFERENCE_TOLERANCE


@pytest.mark.parametrize(("variant", "fault"), cases(MODEL_FAULTS))
def test_a_fault_of_the_model_is_found(saved, variant, fault):
    assert error_of(saved(variant), change=MODEL_FAULTS[fault][1]) > LIMIT


@pytest.mark.parametrize(("variant", "fault"), cases(OPS_FAULTS))
def test_a_fault_of_the_ops_is_found(saved, variant, fault):
    assert error_of(saved(variant), OPS_FAULTS[fault][1]()) > LIMIT


@pytest.mark.parametrize(("variant", "fault"), cases(EXCHANGES))
def test_exchanged_parameters_are_found(saved, variant, fault):
    model, parameters = load_parameters(saved(variant))
    _, first, second = EXCHANGES[fault]
    for name in [name for name in parameters if name.endswith(first)]:
        other = name.removesuffix(first) + second
        parameters[name], parameters[other] = parameters[other], parameters[name]
    assert reference_error(model, parameters, ReferenceOps(), expected_logits(saved(variant))) > LIMIT


@pytest.mark.parametrize("variant", [NEXT, MOE, LATENT])
def test_a_fault_of_any_parameter_is_found(saved, variant):
    """Of the first and the last block: rows or experts in reverse order, or a vector of ones."""
    model, parameters = load_parameters(saved(variant))
    for name, values in parameters.items():
        if ".layers.1." in name or ".layers.2." in name:
            continue
        is_vector = values.ndim == 1 and not name.endswith("bias")
        wrong_values = torch.ones_like(values) if is_vector else values.flip(int(values.shape[0] == 1))
        wrong = {**parameters, name: wrong_values}
        error = reference_error(model, wrong, ReferenceOps(), expected_logits(saved(variant)))
        assert error > LIMIT, name


class Untiled(Qwen35):
    """Value heads of GGUF taken as grouped, as Qwen3-Next's are."""

    def gguf_origin(self, name, spec, layout):
        return Qwen3Next.gguf_origin(self, name, spec, layout)


@pytest.mark.parametrize("variant", [DENSE, MOE])
def test_tiled_heads_taken_as_grouped_are_found(saved, variant):
    path, expected = saved(variant, is_gguf=True), expected_logits(saved(variant))
    model, parameters = load_parameters(path)
    assert reference_error(model, parameters, ReferenceOps(), expected) <= REFERENCE_TOLERANCE
    columns_only = replace(model, has_tiled_output=False)
    assert reference_error(columns_only, parameters, ReferenceOps(), expected) > LIMIT
    assert reference_error(*load_parameters(path, Untiled), ReferenceOps(), expected) > LIMIT


class HeadsOfOthers(DeepseekV3):
    """v before k in each head of the tensor that has both."""

    def hf_origin(self, name, spec, layout):
        origin = super().hf_origin(name, spec, layout)
        if name.endswith("k_b_proj.weight"):
            return replace(origin, rows=origin.rows + self.v_head_dim)
        if name.endswith("v_b_proj.weight"):
            return replace(origin, rows=origin.rows - self.qk_nope_head_dim)
        return origin


@pytest.mark.parametrize("variant", [LATENT, PLAIN_LATENT])
def test_values_before_keys_are_found(saved, variant):
    path = saved(variant)
    error = reference_error(*load_parameters(path, HeadsOfOthers), ReferenceOps(), expected_logits(path))
    assert error > LIMIT
