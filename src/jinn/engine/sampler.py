"""How the next token is drawn from logits: the order of the filters, and random numbers that depend on
nothing but (seed, position). `sample` is the plain definition; native/sample.cpp is the fast twin.

All arithmetic is in float64. Sums over ids are taken one by one in ascending id order, unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jinn.engine.messages import SamplingParams, TokenLogprobs

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
IdBits = npt.NDArray[np.uint32]
"""A set of ids, packed: bit `i % 32` of word `i // 32` stands for id i; [ceil(vocab_size / 32)]."""

NOT_FINITE = "the model's logits are not finite"
NOTHING_LEFT = "min_tokens leaves no token to draw"

_UINT64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SampleRow:
    """All that drawing one token depends on besides its logits."""

    sampling: SamplingParams
    seed: int  # of this choice, 0 <= seed < 2**64
    position: int  # the drawn token's index in its sequence
    seen_ids: npt.NDArray[np.int32]  # distinct ids of prompt and output; empty where no penalty is set
    output_counts: npt.NDArray[np.int32]  # how often each of them was generated
    banned_ids: tuple[int, ...] = ()  # distinct ids that would end the sequence too early
    allowed: Callable[[], IdBits] | None = None  # asked for once the logits are there; None: every id
    target_id: int | None = None  # the id to take, whatever is likely: its log-probability is what is wanted


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The drawn id; or, where none could be drawn, an error and the id -1."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


def sample(logits: npt.NDArray[np.float32], row: SampleRow) -> SampledToken:
    """Draw one token from raw logits [vocab_size].

    1. `adjusted`: the logits with biases, penalties and bans.
    2. `temperature=0`: the largest, the lower id in a tie. Otherwise `draw`.
    3. `logprobs` come from the raw logits.

    An id that is -inf is never drawn. A NaN, a +inf, or nothing left to draw gives an error.
    """
    if not math.isfinite(logits.max()):
        return SampledToken(-1, error=NOT_FINITE)
    if row.target_id is not None:
        return SampledToken(row.target_id, _logprobs(logits, row.target_id, row.sampling.logprobs))
    values = adjusted(logits, row)
    if values.max() == -math.inf:
        return SampledToken(-1, error=NOTHING_LEFT)
    if row.sampling.temperature == 0.0:
        token_id = int(values.argmax())
    else:
        token_id = draw(values, row.sampling, uniform(row.seed, row.position))
    return SampledToken(token_id, _logprobs(logits, token_id, row.sampling.logprobs))


def adjusted(logits: npt.NDArray[np.float32], row: SampleRow) -> Floats:
    """The logits in float64 after, in this order:

    1. `x = -inf` for each id that is not allowed
    2. `x[banned] = -inf`, unless every id that is allowed is banned
    3. `x[id] += bias` for each id of logit_bias
    4. for each seen id: `x / repetition_penalty` if x > 0, else `x * repetition_penalty`
    5. for each generated id: `x -= presence_penalty`, then `x -= frequency_penalty * count`
    """
    sampling = row.sampling
    values = logits.astype(np.float64)
    banned = list(row.banned_ids)
    if row.allowed is not None:
        is_allowed = unpacked(row.allowed(), len(values))
        values[~is_allowed] = -math.inf
        if is_allowed[banned].sum() == is_allowed.sum():
            banned = []
    values[banned] = -math.inf
    for token_id, bias in sampling.logit_bias.items():
        values[token_id] += bias
    seen = row.seen_ids
    if len(seen) and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        values[seen] = np.where(values[seen] > 0.0, values[seen] / penalty, values[seen] * penalty)
    if len(seen):
        values[seen] -= sampling.presence_penalty * (row.output_counts > 0)
        values[seen] -= sampling.frequency_penalty * row.output_counts
    return values


def unpacked(bits: IdBits, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Whether each id is in the set, bool [vocab_size]."""
    return np.unpackbits(bits.view(np.uint8), count=vocab_size, bitorder="little").astype(np.bool_)


def draw(values: Floats, sampling: SamplingParams, u: float) -> int:
    """Draw an id; each filter sees only what the one before it left.

    1. top_k keeps the k largest, the lower ids among those equal at the edge.
    2. The weight of an id is `exp((x - largest) / temperature)`.
    3. min_p keeps weights of at least min_p (the largest weight is 1).
    4. top_p keeps the heaviest ids, the lower id first among equals: the fewest whose sum, taken in that
       order, reaches top_p times the sum of all.
    5. The answer is the first id, in ascending order, at which the running sum exceeds u times the whole sum.
    """
    ids: Ids = np.arange(len(values))
    if 0 < sampling.top_k < len(values):
        ids = np.sort(_largest(values, sampling.top_k))
    with np.errstate(over="ignore"):  # a temperature near 0 sends all but the largest to -inf
        weights = np.exp((values[ids] - values.max()) / sampling.temperature)
    if sampling.min_p > 0.0:
        kept = weights >= sampling.min_p
        ids, weights = ids[kept], weights[kept]
    if sampling.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        reached = np.searchsorted(np.cumsum(weights[order]), sampling.top_p * _total(weights))
        kept_indices = np.sort(order[: reached + 1])
        ids, weights = ids[kept_indices], weights[kept_indices]
    running = np.cumsum(weights)
    return int(ids[np.searchsorted(running, u * running[-1], side="right")])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1): output `position` of the generator splitmix64 started at `mix(seed)`.

    In integers modulo 2**64:

        mix(z):   z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
                  z = (z ^ (z >> 27)) * 0x94D049BB133111EB
                  return z ^ (z >> 31)
        uniform:  (mix(mix(seed) + (position + 1) * 0x9E3779B97F4A7C15) >> 11) * 2**-53

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    state = (_mix(seed) + (position + 1) * 0x9E3779B97F4A7C15) & _UINT64
    return (_mix(state) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _UINT64
    return z ^ (z >> 31)


def _logprobs(logits: npt.NDArray[np.float32], token_id: int, num_top: int | None) -> TokenLogprobs | None:
    """`x - log(sum(exp(x)))`, rounded to float32: of the chosen id and of the `num_top` largest logits."""
    if num_top is None:
        return None
    values = logits.astype(np.float64)
    largest = values.max()
    log_sum = largest + math.log(_total(np.exp(values - largest)))
    top = _largest(logits, min(num_top, len(logits)))
    return TokenLogprobs(
        float(np.float32(values[token_id] - log_sum)),
        tuple((int(i), float(np.float32(values[i] - log_sum))) for i in top),
    )


def _largest(values: npt.NDArray[np.floating], count: int) -> Ids:
    """Ids of the `count` largest values, best first, the lower id first among equals."""
    return np.argsort(-values, kind="stable")[:count]


def _total(weights: Floats) -> float:
    return float(np.cumsum(weights)[-1])
