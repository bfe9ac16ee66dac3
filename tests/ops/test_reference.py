"""The definition of the ops against torch's own functions, forward and gradient."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from jinn.ops.protocol import Context, KVSpec, Rope, RouteSpec, Routing, StateSpec
from jinn.ops.reference import LEVELS, PagedCache, ReferenceOps, integer_groups, tensor_batch
from native.programs import packed_sequences

OPS = ReferenceOps()
LENGTHS = (1, 5, 33, 40)
BATCH = tensor_batch(packed_sequences([(range(n), n) for n in LENGTHS]))
SPEC = KVSpec(2, 8, 12)
STATE_SPEC = StateSpec(2, 6, 8, 4, 4)
SCALE = 0.3


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def node(weight, bias=None):
    return SimpleNamespace(weight=weight, bias=bias)


def check(ours, theirs, inputs, atol=1e-6):
    """Equal values, and equal gradients of a random weighting of them."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)
    weighting = random_tensor(*ours.shape, seed=99).detach()
    our_gradients = torch.autograd.grad((ours * weighting).sum(), inputs)
    their_gradients = torch.autograd.grad((theirs * weighting).sum(), inputs)
    for ours_of, theirs_of in zip(our_gradients, their_gradients, strict=True):
        assert ours_of.abs().max() > 0
        torch.testing.assert_close(ours_of, theirs_of, rtol=1e-4, atol=1e-5)


def test_embed():
    table = random_tensor(50, 8)
    check(OPS.embed(node(table), Context(BATCH)), table[BATCH.token_ids], [table])


def test_linear():
    x, bias = random_tensor(6, 10), random_tensor(7)
    plain, biased = random_tensor(4, 10, seed=1), random_tensor(7, 10, seed=2)
    first, second = OPS.linear(x, [node(plain), node(biased, bias)], Context(BATCH))
    check(first, functional.linear(x, plain), [x, plain])
    check(second, functional.linear(x, biased, bias), [x, biased, bias])


def test_add_and_silu_mul():
    a, b = random_tensor(6, 10), random_tensor(6, 10, seed=1)
    check(OPS.add(a, b), a + b, [a, b])
    check(OPS.silu_mul(a, b), functional.silu(a) * b, [a, b])


@pytest.mark.parametrize("gate_cols", [1, 10])
def test_sigmoid_mul(gate_cols):
    x, gate = random_tensor(6, 10), random_tensor(6, gate_cols, seed=1)
    check(OPS.sigmoid_mul(x, gate), x / (1 + (-gate).exp()), [x, gate])


@pytest.mark.parametrize("num_runs", [1, 4])
def test_rms_norm(num_runs):
    x, weight = random_tensor(6, 10 * num_runs), random_tensor(10, seed=1)
    theirs = functional.rms_norm(x.reshape(6, num_runs, 10), (10,), weight, eps=1e-3).reshape(6, -1)
    check(OPS.rms_norm(x, node(weight), 1e-3), theirs, [x, weight])
    without_one = OPS.rms_norm(x, node(weight - 1), 1e-3, offset=1.0)
    torch.testing.assert_close(without_one, theirs)


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_rope_turns_pairs_as_complex_numbers(is_interleaved):
    num_tokens, num_heads, pairs = sum(LENGTHS), 3, 4
    rope = Rope((1.0, 0.5, 0.1, 0.01), 1.5, is_interleaved)
    x = random_tensor(num_tokens, num_heads * 10)
    heads = x.reshape(num_tokens, num_heads, 10)
    if is_interleaved:
        real, imaginary = heads[..., 0:8:2], heads[..., 1:8:2]
    else:
        real, imaginary = heads[..., :4], heads[..., 4:8]
    angles = BATCH.positions[:, None, None].float() * torch.tensor(rope.inv_freq)
    turned = torch.complex(real, imaginary) * torch.polar(torch.tensor(1.5), angles)
    order = torch.arange(2 * pairs).reshape(2, pairs).T.reshape(-1) if is_interleaved else slice(None)
    rotated = torch.cat((turned.real, turned.imag), -1)[..., order]
    theirs = torch.cat((rotated, heads[..., 8:]), -1).reshape(num_tokens, -1)
    check(OPS.rope(x, Context(BATCH), rope, num_heads), theirs, [x])


def random_qkv():
    num_tokens = sum(LENGTHS)
    q = random_tensor(num_tokens, 6 * SPEC.key_dim)
    k = random_tensor(num_tokens, SPEC.num_kv_heads * SPEC.key_dim, seed=1)
    v = random_tensor(num_tokens, SPEC.num_kv_heads * SPEC.value_dim, seed=2)
    return q, k, v


def test_attention_without_a_cache():
    """Packed sequences do not see each other; gradients reach queries, keys and values."""
    q, k, v = random_qkv()
    outputs = []
    for start, stop in zip(BATCH.query_start[:-1], BATCH.query_start[1:], strict=True):
        heads = [
            x[start:stop].reshape(stop - start, n, -1).transpose(0, 1) for x, n in ((q, 6), (k, 2), (v, 2))
        ]
        y = functional.scaled_dot_product_attention(*heads, is_causal=True, scale=SCALE, enable_gqa=True)
        outputs.append(y.transpose(0, 1).flatten(1))
    check(OPS.attention(q, k, v, Context(BATCH), SPEC, SCALE), torch.cat(outputs), [q, k, v])


def test_attention_with_a_cache_is_the_same():
    q, k, v = random_qkv()
    whole = OPS.attention(q, k, v, Context(BATCH), SPEC, SCALE)
    cache = PagedCache([SPEC], "f32", BATCH.block_tables.numel(), 16)
    torch.testing.assert_close(OPS.attention(q, k, v, Context(BATCH, cache), SPEC, SCALE), whole)
    steps = PagedCache([SPEC], "f32", 4, 16)
    rows = torch.arange(6, 39)  # the third sequence, token by token
    for position, row in enumerate(rows):
        one = tensor_batch(packed_sequences([([0], position + 1)]))
        y = OPS.attention(*(x[row : row + 1] for x in (q, k, v)), Context(one, steps), SPEC, SCALE)
        torch.testing.assert_close(y, whole[row : row + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "step"), [("bf16", 2**-8), ("int8", 1 / 254)])
def test_a_cache_rounds_once(dtype, step):
    """What is stored is near what came, and stays when stored again."""
    numbers = random_tensor(16, 2, 8).detach()
    batch = tensor_batch(packed_sequences([(range(16), 16)]))
    cache = PagedCache([KVSpec(2, 8, 8)], dtype, 1, 16)
    cache.store(0, batch, 0, numbers, numbers)
    keys, values = cache.load(0, batch, 0)
    assert torch.equal(keys, values)
    assert 0 < (keys - numbers).abs().max() <= 1.01 * step * numbers.abs().max()
    cache.store(0, batch, 0, keys, values)
    again = cache.load(0, batch, 0)[0]
    torch.testing.assert_close(again, keys, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("activations", "levels"), LEVELS.items())
def test_integer_groups_round_each_row_by_itself(activations, levels):
    x = random_tensor(20, 96).detach() * torch.logspace(-3, 3, 20)[:, None]
    x[7] = 0
    rounded = integer_groups(x, activations)
    largest = x.reshape(20, 3, 32).abs().amax(-1).repeat_interleave(32, 1)
    assert ((rounded - x).abs() <= largest * (0.5002 / levels)).all()
    assert not torch.equal(rounded, x)
    assert not rounded[7].any()
    for row in range(20):
        assert torch.equal(integer_groups(x[row : row + 1], activations), rounded[row : row + 1])


def test_mixed_groups_leave_outliers_alone():
    x = 1 + torch.rand(4, 96, generator=torch.Generator().manual_seed(0)) / 100
    x[0, 40] = 5.5  # 30.25 of some 61.5: not quite half
    x[1, 40] = 5.8  # 33.64 of some 64.9
    x[2, 40], x[2, 63] = -100.0, 9.5
    x[3, 40], x[3, 50], x[3, 63] = 1e4, 1e3, 100.0
    rounded = integer_groups(x, "mixed")
    assert torch.equal(rounded[0], integer_groups(x[:1], "int8")[0])
    for row, outliers in ((1, [40]), (2, [40, 63]), (3, [40, 50])):
        rest = x[row : row + 1].clone()
        rest[0, outliers] = 0
        expected = integer_groups(rest, "int8")[0]
        expected[outliers] = x[row, outliers]
        assert torch.equal(rounded[row], expected)


def test_activations_are_rounded_only_where_a_kernel_would():
    x = random_tensor(4, 64).detach()
    bf16 = x.bfloat16().float()
    expected = {
        ("int8", "Q4_1"): integer_groups(x, "int8"), ("int12", "Q8_0"): integer_groups(x, "int12"),
        ("mixed", "Q4_K"): integer_groups(x, "mixed"), ("mixed", "BF16"): bf16,
        ("int8", "BF16"): bf16, ("int12", "BF16"): bf16, ("int8", "F16"): x, ("int12", "F32"): x,
        ("bf16", "Q4_1"): bf16, ("bf16", "F32"): bf16, ("f32", "Q8_0"): x, ("f32", "BF16"): x,
    }  # fmt: skip
    for (activations, weight_format), held in expected.items():
        assert torch.equal(ReferenceOps(activations).held(x, weight_format), held)


@pytest.mark.parametrize("is_renormalized", [False, True])
def test_softmax_routing(is_renormalized):
    """Renormalized weights are the softmax of the chosen logits alone."""
    x, weight = random_tensor(9, 10), random_tensor(8, 10, seed=1)
    routing = OPS.route(x, node(weight), RouteSpec(3, is_renormalized=is_renormalized))
    best, ids = functional.linear(x, weight).topk(3)
    assert torch.equal(routing.ids, ids)
    weights = best.softmax(-1) if is_renormalized else functional.linear(x, weight).softmax(-1).gather(1, ids)
    check(routing.weights, weights, [x, weight])
    torch.testing.assert_close(routing.scores, functional.linear(x, weight).softmax(-1))


def test_sigmoid_routing_in_groups():
    """DeepSeek-V3's router (arXiv 2412.19437, eq. 12 to 16), token by token and in plain numbers."""
    x, weight, bias = random_tensor(30, 10), random_tensor(12, 10, seed=1), random_tensor(12, seed=2)
    router = SimpleNamespace(weight=weight, e_score_correction_bias=bias.detach())
    routing = OPS.route(x, router, RouteSpec(3, "sigmoid", True, 4, 2, 2.5))
    scores = functional.linear(x, weight).sigmoid()
    expected = []
    for token in range(30):
        ranking = (scores[token] + bias).tolist()
        groups = [sorted(ranking[3 * g : 3 * g + 3])[-2:] for g in range(4)]
        allowed = sorted(range(4), key=lambda g, groups=groups: -sum(groups[g]))[:2]
        candidates = [e for e in range(12) if e // 3 in allowed]
        ids = sorted(candidates, key=lambda e, ranking=ranking: -ranking[e])[:3]
        assert routing.ids[token].tolist() == ids
        expected.append(2.5 * scores[token, ids] / scores[token, ids].sum())
    check(routing.weights, torch.stack(expected), [x, weight])


def test_ties_between_experts_go_to_the_lower_id():
    x = random_tensor(3, 10)
    for spec in (RouteSpec(4), RouteSpec(4, "sigmoid", num_groups=4, num_chosen_groups=2)):
        assert OPS.route(x, node(torch.zeros(16, 10)), spec).ids.tolist() == [[0, 1, 2, 3]] * 3


def test_experts():
    """Against all experts of every token, with weights of 0 for those it did not choose."""
    x, weights = random_tensor(20, 10), random_tensor(20, 3, seed=1)
    ids = random_tensor(20, 6, seed=2).argsort(-1)[:, :3]
    gate, up, down = random_tensor(6, 7, 10), random_tensor(6, 7, 10, seed=3), random_tensor(6, 10, 7, seed=4)
    mixture = SimpleNamespace(gate_proj=node(gate), up_proj=node(up), down_proj=node(down))
    ours = OPS.experts(x, Routing(ids, weights, weights), mixture)
    hidden = functional.silu(torch.einsum("th,eih->tei", x, gate)) * torch.einsum("th,eih->tei", x, up)
    outputs = torch.einsum("tei,ehi->teh", hidden, down)
    factors = torch.zeros(20, 6).scatter(1, ids, weights)
    # sums of numbers of about 30, in another order
    check(ours, torch.einsum("te,teh->th", factors, outputs), [x, weights, gate, up, down], atol=1e-5)


def test_heads_are_split_and_joined():
    x = random_tensor(6, 3 * 7)
    first, second = OPS.split_heads(x, 3, (2, 5))
    assert torch.equal(first, torch.cat([x[:, i : i + 2] for i in (0, 7, 14)], 1))
    assert torch.equal(second, torch.cat([x[:, i + 2 : i + 7] for i in (0, 7, 14)], 1))
    assert torch.equal(OPS.join_heads([first, second], 3), x)
    assert torch.equal(OPS.join_heads([first, second], 1), torch.cat([first, second], 1))


def test_head_linear():
    x, weight = random_tensor(6, 3 * 10), random_tensor(3, 4, 10, seed=1)
    parts = [functional.linear(x[:, 10 * h : 10 * h + 10], weight[h]) for h in range(3)]
    check(OPS.head_linear(x, node(weight)), torch.cat(parts, 1), [x, weight])


def test_causal_conv1d():
    """Packed sequences do not see each other."""
    x, weight = (
        random_tensor(sum(LENGTHS), STATE_SPEC.conv_dim),
        random_tensor(STATE_SPEC.conv_dim, 4, seed=1),
    )
    parts = [
        functional.conv1d(part.T[None], weight[:, None], padding=3, groups=STATE_SPEC.conv_dim)[0, :, :-3].T
        for part in x.split(LENGTHS)
    ]
    ours = OPS.causal_conv1d(x, node(weight), Context(BATCH), STATE_SPEC)
    check(ours, functional.silu(torch.cat(parts)), [x, weight])


def delta_rule_inputs():
    num_tokens, num_heads = sum(LENGTHS), STATE_SPEC.num_value_heads
    qkv = random_tensor(num_tokens, STATE_SPEC.conv_dim)
    a, b = random_tensor(num_tokens, num_heads, seed=1), random_tensor(num_tokens, num_heads, seed=2)
    decay = SimpleNamespace(A_log=random_tensor(num_heads, seed=3), dt_bias=random_tensor(num_heads, seed=4))
    return qkv, a, b, decay


def test_gated_delta_rule():
    """Against transformers' form in chunks of 64, sequence by sequence."""
    qkv, a, b, params = delta_rule_inputs()
    g = -params.A_log.exp() * functional.softplus(a + params.dt_bias)
    q, k, v = qkv.split((16, 16, 24), dim=1)
    q, k = (x.reshape(-1, 2, 8).repeat_interleave(3, dim=1) for x in (q, k))
    inputs = zip(*(x.split(LENGTHS) for x in (q, k, v.reshape(-1, 6, 4), g, b.sigmoid())), strict=True)
    parts = [
        torch_chunk_gated_delta_rule(*(x[None] for x in part), use_qk_l2norm_in_kernel=True)[0][0]
        for part in inputs
    ]
    ours = OPS.gated_delta_rule(qkv, a, b, params, Context(BATCH), STATE_SPEC)
    leaves = [qkv, a, b, params.A_log, params.dt_bias]
    check(ours, torch.cat(parts).flatten(1), leaves)


def state_batch(start, end, slot=0, num_drafts=0, num_accepted=0):
    """One sequence's tokens from `start` to `end`."""
    counts = {
        "state_slots": np.array([slot], np.int32),
        "num_drafts": np.array([num_drafts], np.int32),
        "num_accepted": np.array([num_accepted], np.int32),
    }
    return tensor_batch(replace(packed_sequences([([0] * (end - start), end)]), **counts))


def run_linear_attention(inputs, batch, cache, rows):
    qkv, a, b, decay, conv = inputs
    ctx = Context(batch, cache, layer=1)
    mixed = OPS.causal_conv1d(qkv[rows], conv, ctx, STATE_SPEC)
    return OPS.gated_delta_rule(mixed, a[rows], b[rows], decay, ctx, STATE_SPEC)


def test_states_go_on_in_a_cache():
    """In parts, with drafts of which some are accepted, and from a copied slot: as the whole sequence."""
    inputs = (*delta_rule_inputs(), node(random_tensor(STATE_SPEC.conv_dim, 4, seed=5)))
    first = sum(LENGTHS[:3])  # the sequence of 40 tokens
    whole = run_linear_attention(inputs, state_batch(0, 40), None, slice(first, first + 40))
    cache = PagedCache([SPEC], "f32", 4, 16)

    def check_part(start, end, **counts):
        rows = slice(first + start, first + end)
        part = run_linear_attention(inputs, state_batch(start, end, **counts), cache, rows)
        torch.testing.assert_close(part, whole[start:end], rtol=1e-5, atol=1e-6)

    check_part(0, 2)
    check_part(2, 9, num_drafts=3)  # tokens 6, 7 and 8 are drafts
    for num_accepted in range(4):
        cache.states.copy_slot(0, 1 + num_accepted)
        check_part(6 + num_accepted, 20, slot=1 + num_accepted, num_accepted=num_accepted)
        check_part(20, 21, slot=1 + num_accepted)
    check_part(0, 40, slot=2)  # a slot that another sequence had


def test_given_hidden():
    rows = replace(packed_sequences([(range(3), 3)]), hidden=np.ones((3, 5), np.float32))
    assert torch.equal(OPS.given_hidden(5, Context(tensor_batch(rows))), torch.ones(3, 5))


def test_select_rows():
    x = random_tensor(sum(LENGTHS), 3)
    rows = packed_sequences([(range(n), n) for n in LENGTHS])
    batch = tensor_batch(rows)
    assert torch.equal(OPS.select_rows(x, Context(batch)), x)
    assert np.array_equal(batch.logit_rows, rows.logit_rows)
