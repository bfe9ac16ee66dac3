"""The vocabulary that the engine and everything around it share, and its wire form.

Each message is a frozen dataclass. `encode` turns one into bytes and `decode` turns it back; the API process
and the engine process exchange nothing else. This module knows neither models nor HTTP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

MAX_SEED = 2**63 - 1


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence id, a stop id or a stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"  # the client left
    ERROR = "error"  # this sequence failed; `TokenOutput.error` says how


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """The most tokens that a model may think before it answers; then `closing_ids` take the place of its own.

    The thoughts begin after `start_id`, or with the answer itself where that is None, and end with `end_id`.

    Raises ValueError naming the field.
    """

    max_tokens: int
    start_id: int | None
    end_id: int
    closing_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        check_range("thinking_budget", self.max_tokens, 0, 2**31 - 1)
        if self.end_id not in self.closing_ids:
            raise ValueError("thinking_budget must close with the id that ends the thoughts")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All ids that it names."""
        return (self.end_id, *self.closing_ids, *(() if self.start_id is None else (self.start_id,)))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when to stop.

    `top_k=0`, `top_p=1`, `min_p=0` switch the filter off; `temperature=0` takes the most likely id. Choice
    `i` of `n` draws with `seed + i`. `logprobs=None` returns none, `0` the chosen token's, `k` also the `k`
    most likely ids'; they are the model's own log-probabilities, before temperature, penalties and bias.

    Raises ValueError naming the field.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    thinking_budget: ThinkingBudget | None = None

    def __post_init__(self) -> None:
        check_range("n", self.n, 1, 128)
        check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        check_range("temperature", self.temperature, 0.0, 100.0)
        check_range("top_k", self.top_k, 0, 2**31 - 1)
        check_range("top_p", self.top_p, 0.0, 1.0)
        check_range("min_p", self.min_p, 0.0, 1.0)
        check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_range("logprobs", self.logprobs, 0, 20)
        check_range("seed", self.seed, 0, MAX_SEED)
        for token_id, bias in self.logit_bias.items():
            check_range("logit_bias", token_id, 0, 2**31 - 1)
            check_range("logit_bias", bias, -100.0, 100.0)
        for token_id in self.stop_token_ids:
            check_range("stop_token_ids", token_id, 0, 2**31 - 1)
        if self.top_p == 0.0:
            raise ValueError("top_p must be greater than 0")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ValueError("stop must hold non-empty strings")


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Raise ValueError naming the field unless `value` is None or from `low` to `high`; ints if `low` is."""
    if value is None:
        return
    if type(value) not in ((int,) if isinstance(low, int) else (int, float)):
        kind = "an integer" if isinstance(low, int) else "a number"
        raise ValueError(f"{name} must be {kind}, not {type(value).__name__}")
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}")


GRAMMAR_ERROR = "the grammar cannot be followed further"
"""How the error begins of a choice that its grammar leaves nothing to draw for, or cannot be held to it."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must be, from the id `after_id` on; from its start where that is None.

    `text` is as llguidance reads it: Lark, or JSON with a list of grammars. With an `opening_id` an answer
    waits for `after_id` only if its first id is that one.
    """

    text: str
    after_id: int | None = None
    opening_id: int | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    """A request: its prompt's ids, on whose behalf, how to sample, and what grammar to hold the answer to.

    `sampling.seed` is set, and `sampling.stop` is empty, since text is the caller's business. A grammar goes
    before `ignore_eos` and `min_tokens`: an answer that it leaves nothing to add to ends. Of a chat,
    `turn_starts` tells where in the prompt what each message says begins: others may share what is before.
    """

    request_id: str
    tenant: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    grammar: Grammar | None = None
    turn_starts: tuple[int, ...] = ()
    adapter: str | None = None  # of those that the engine has loaded; None: the model as it is


class Pooling(StrEnum):
    """How the last hidden states of a text become one vector."""

    LAST = "last"  # the last token's
    MEAN = "mean"  # of all tokens


@dataclass(frozen=True, slots=True)
class Score:
    """Read a text without adding to it.

    `num_logprobs` asks for the log-probability of each token after the first, and of as many likeliest ids;
    `pooling` for the text's hidden state after the last norm. One of the two is None.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_logprobs: int | None
    pooling: Pooling | None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop a request (every choice of it, or one) and free what it holds. Unknown ids are ignored."""

    request_id: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """What an engine process is told first: an EngineConfig in JSON."""

    config: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Drop everything and end the engine process."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Weights read so far, in bytes."""

    loaded_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine can take requests; `notes` are the automatic choices it made, each with its reason."""

    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    num_blocks: int
    block_size: int
    eos_token_ids: tuple[int, ...]
    system_fingerprint: str
    notes: tuple[str, ...]
    adapters: tuple[tuple[str, str], ...] = ()  # their names and digests


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine could not start or cannot go on."""

    error: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms: of the chosen token, and of the most likely ids, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step gave one choice of a request. Its last output carries `finish_reason`."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id where asked for
    num_cached_tokens: int = 0  # prompt tokens that were read from the cache
    num_draft_tokens: int = 0  # that this step checked, and
    num_accepted_tokens: int = 0  # that turned out right
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """The answer to a `Score`: what it asked for, or an error."""

    request_id: str
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens after the first
    embedding: tuple[float, ...] = ()  # [hidden_size], as it comes, without normalisation
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Prefilling:
    """How far a prompt has been read."""

    request_id: str
    num_computed_tokens: int  # those from the cache included
    num_prompt_tokens: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges at the end of a step, and counters since the start."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0  # held by sequences
    num_cached_blocks: int = 0  # kept for reuse only
    num_prompt_tokens: int = 0  # computed
    num_cached_tokens: int = 0  # read from the cache instead
    num_prefix_queries: int = 0  # prompt tokens looked up in the cache
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_states: int = 0  # slots for recurrent states
    num_snapshots: int = 0  # of them, kept for reuse only
    num_drafts: int = 0  # times that drafts were checked
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # drafts that turned out right
    num_steps: int = 0
    step_seconds: float = 0.0  # that the last step took


@dataclass(frozen=True, slots=True)
class StepOutput:
    """All that one engine step has to say; the reader wakes up once for it."""

    outputs: tuple[TokenOutput, ...]
    prefilling: tuple[Prefilling, ...]
    stats: EngineStats
    scores: tuple[ScoreOutput, ...] = ()


Message = Start | Submit | Score | Abort | Shutdown | Loading | Ready | Failed | StepOutput

_MESSAGES = (Start, Submit, Score, Abort, Shutdown, Loading, Ready, Failed, StepOutput)
_PARTS = (
    ThinkingBudget,
    SamplingParams,
    Grammar,
    TokenLogprobs,
    TokenOutput,
    ScoreOutput,
    Prefilling,
    EngineStats,
)

Decoder = Callable[[Any], Any]


def encode(message: Message) -> bytes:
    """The message as JSON: a list of its class name and its fields; nested dataclasses without the name."""
    return _encoder.encode((type(message).__name__, *_field_values(message))).encode("ascii")


def decode(data: bytes) -> Message:
    """The message that `encode` wrote. Raises ValueError for anything else."""
    try:
        tagged = json.loads(str(data, "ascii"))
    except RecursionError as error:
        raise ValueError("message is nested too deeply") from error
    if type(tagged) is not list or not tagged or type(tagged[0]) is not str:
        raise ValueError("message must be a list that starts with a class name")
    tag, *values = tagged
    if tag not in _message_decoders:
        raise ValueError(f"unknown message {tag!r}")
    message: Message = _message_decoders[tag](values)
    return message


def _field_values(value: Any) -> Any:
    """What stands for a value that JSON does not know: a dataclass's fields in order, or a plain dict."""
    if getter := _getters.get(type(value)):
        return getter(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no wire form")


def _field_getter(cls: type) -> Callable[[Any], tuple[Any, ...]]:
    names = [f.name for f in fields(cls)]
    if not names:
        return lambda value: ()
    if len(names) == 1:
        only = attrgetter(names[0])
        return lambda value: (only(value),)
    return attrgetter(*names)


def _scalar(*types: type) -> Decoder:
    def decode_scalar(value: Any) -> Any:
        if type(value) not in types:
            raise ValueError(f"expected {types[0].__name__}, got {type(value).__name__}")
        return value

    return decode_scalar


_scalars: dict[Any, Decoder] = {
    int: _scalar(int),
    float: _scalar(float, int),
    str: _scalar(str),
    bool: _scalar(bool),
}


def _decoder(hint: Any) -> Decoder:
    """The strict reader of what an annotation allows."""
    if hint in _scalars:
        return _scalars[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return _optional(_decoder(inner))
    if origin is tuple and arguments[-1] is Ellipsis:
        return _int_tuple if arguments[0] is int else _tuple_of(_decoder(arguments[0]))
    if origin is tuple:
        return _row(lambda *values: values, arguments)
    if origin is Mapping:
        return _int_mapping(_decoder(arguments[1]))
    if issubclass(hint, StrEnum):
        return lambda value: hint(value)
    hints = get_type_hints(hint)
    return _row(hint, tuple(hints[f.name] for f in fields(hint)))


def _optional(inner: Decoder) -> Decoder:
    return lambda value: None if value is None else inner(value)


def _int_tuple(value: Any) -> tuple[int, ...]:
    _check_list(value)
    if not set(map(type, value)) <= {int}:
        raise ValueError("expected a list of int")
    return tuple(value)


def _tuple_of(item: Decoder) -> Decoder:
    def decode_tuple(value: Any) -> tuple[Any, ...]:
        _check_list(value)
        return tuple(map(item, value))

    return decode_tuple


def _row(make: Callable[..., Any], hints: tuple[Any, ...]) -> Decoder:
    """Reads a list of fixed length. Scalars of types that were right before are checked all at once."""
    decoders = tuple(map(_decoder, hints))
    nested = tuple((i, decoder) for i, decoder in enumerate(decoders) if not _is_scalar(hints[i]))
    known_types: set[tuple[type, ...]] = set()

    def decode_row(value: Any) -> Any:
        _check_list(value)
        types = tuple(map(type, value))
        if types not in known_types:
            if len(value) != len(decoders):
                raise ValueError(f"expected {len(decoders)} fields, got {len(value)}")
            value = [decoder(v) for decoder, v in zip(decoders, value, strict=True)]
            known_types.add(types)
            return make(*value)
        for i, decoder in nested:
            value[i] = decoder(value[i])
        return make(*value)

    return decode_row


def _is_scalar(hint: Any) -> bool:
    return hint in _scalars or (
        get_origin(hint) is UnionType and all(t in (*_scalars, NoneType) for t in get_args(hint))
    )


def _int_mapping(item: Decoder) -> Decoder:
    def decode_mapping(value: Any) -> dict[int, Any]:
        if type(value) is not dict:
            raise ValueError(f"expected an object, got {type(value).__name__}")
        if not all(key.isascii() and key.isdigit() for key in value):
            raise ValueError("expected token ids as keys")
        return {int(key): item(v) for key, v in value.items()}

    return decode_mapping


def _check_list(value: Any) -> None:
    if type(value) is not list:
        raise ValueError(f"expected a list, got {type(value).__name__}")


_getters = {cls: _field_getter(cls) for cls in (*_MESSAGES, *_PARTS)}
_encoder = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_field_values)
_message_decoders = {cls.__name__: _decoder(cls) for cls in _MESSAGES}
