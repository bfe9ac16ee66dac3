"""The engine's settings, each declared once, and what loading a model tells the engine about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Literal, get_args

from jinn.engine.messages import check_range
from jinn.logs import LogLevel

if TYPE_CHECKING:
    from jinn.text.tokenizer import Tokenizer

KVCacheDtype = Literal["bf16", "int8", "f32"]
Activations = Literal["auto", "int12", "mixed", "int8", "bf16", "f32"]
Speculative = Literal["off", "ngram", "draft", "mtp"]

# A run of text that came before is long; a module or a small model is seldom right for long.
_SPECULATIVE_TOKENS = {"off": 0, "ngram": 8, "draft": 4, "mtp": 3}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an operator may choose. Raises ValueError naming the field.

    `num_threads=None` takes the physical cores this process may use; `max_model_len=None` the model's own
    limit. The cache may clip `max_model_len` and `max_num_seqs`; `Ready.notes` says so.
    """

    model: str  # a path
    num_threads: int | None = None
    max_model_len: int | None = None  # tokens of prompt and answer together
    max_num_seqs: int = 64  # that run at the same time
    max_num_batched_tokens: int = 512  # of one step; prompts beyond it wait for the next
    max_step_ms: float = 250.0  # aimed at by steps that read a prompt while others generate
    cache_memory: int = 2 * 2**30  # bytes
    tenant_cache_memory: int | None = None  # bytes that one tenant may keep for reuse only
    kv_cache_dtype: KVCacheDtype = "bf16"
    activations: Activations = "auto"  # inputs of integer weights; auto: int12 with AMX, or else mixed
    block_size: int = 32  # tokens per cache block
    state_memory: int | None = None  # bytes of cache_memory for recurrent states; None: half of it
    speculative: Speculative = "off"  # where guesses at the next tokens come from
    num_speculative_tokens: int | None = None  # guessed at a time; None: what suits the source
    packed_cache: str | None = None  # a folder to keep packed weights in; None: memory, if experts fit
    verify: bool = False  # compare the checksums of a file in packed_cache at the start
    draft_model: str | None = None  # a path; with speculative "draft"
    lora_adapters: Mapping[str, str] = field(default_factory=dict)  # folders by the names of the adapters
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError("model must be a path")
        check_range("num_threads", self.num_threads, 1, 4096)
        check_range("max_model_len", self.max_model_len, 2, 2**31 - 1)
        check_range("max_num_seqs", self.max_num_seqs, 1, 65536)
        check_range("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        check_range("max_step_ms", self.max_step_ms, 1.0, 1e6)
        check_range("cache_memory", self.cache_memory, 1, 2**62)
        check_range("tenant_cache_memory", self.tenant_cache_memory, 0, 2**62)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, get_args(KVCacheDtype))
        _check_choice("activations", self.activations, get_args(Activations))
        _check_choice("log_level", self.log_level, get_args(LogLevel))
        check_range("block_size", self.block_size, 1, 1024)
        check_range("state_memory", self.state_memory, 1, self.cache_memory)
        _check_choice("speculative", self.speculative, get_args(Speculative))
        check_range("num_speculative_tokens", self.num_speculative_tokens, 1, 64)
        if (self.draft_model is None) == (self.speculative == "draft"):
            raise ValueError("draft_model goes with speculative draft, and with nothing else")
        if self.verify and self.packed_cache is None:
            raise ValueError("verify goes with packed_cache, whose checksums it compares")
        for name, path in self.lora_adapters.items():
            if not isinstance(path, str) or not path or not 1 <= len(name) <= 256:
                raise ValueError("lora_adapters must be paths by names of 1 to 256 characters")

    @property
    def num_draft_tokens(self) -> int:
        """The most that a step checks of a sequence."""
        if self.num_speculative_tokens is None or self.speculative == "off":
            return _SPECULATIVE_TOKENS[self.speculative]
        return self.num_speculative_tokens

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        """The config that `to_json` wrote. Raises ValueError, also for a key that is no setting."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("the engine's config must be a JSON object")
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise ValueError(f"unknown setting {unknown[0]}")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine needs to know of a loaded model besides its `Runner`."""

    max_model_len: int  # tokens the model was made for
    eos_token_ids: tuple[int, ...]
    system_fingerprint: str  # names the weights, the build and the ISA path
    notes: tuple[str, ...] = ()  # automatic choices made while loading, each with its reason
    adapters: tuple[tuple[str, str], ...] = ()  # names, in the order of their numbers, with their digests
    load_tokenizer: Callable[[], Tokenizer] | None = None  # called once, if a request has a grammar


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
