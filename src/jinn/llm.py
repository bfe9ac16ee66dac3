"""A model in the caller's own thread: prompts in, answers out. `jinn serve` runs it in a process."""

from __future__ import annotations

import itertools
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from jinn.engine.config import Activations, EngineConfig, KVCacheDtype, Speculative
from jinn.engine.engine import Engine
from jinn.engine.messages import (
    Abort,
    EngineStats,
    FinishReason,
    Grammar,
    Prefilling,
    Ready,
    SamplingParams,
    Submit,
    TokenLogprobs,
    TokenOutput,
)
from jinn.engine.start import LoadRunner, start_engine
from jinn.frontend import load_frontend
from jinn.text.chat_format import ChatFormat
from jinn.text.choice import Choice, Delta
from jinn.text.structured_output import StructuredOutput
from jinn.text.turns import turn_starts
from jinn.weights.hub import resolve_model

DEFAULT_MAX_TOKENS = 256  # of an answer, where no SamplingParams are given

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Progress = Callable[[int, int], None]
"""Takes how much is done, and how much there is."""

_TENANT = "local"
_MAX_DRAWN_SEED = 2**53


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer: its first choice, and through `choices` or an index all `n` of them, each a Completion.

    Attributes:
        text: without the text of the stop string or of the id that ended it.
        token_ids: every id that was drawn, also the one that ended the answer.
        logprobs: one per id of `token_ids`; None unless `SamplingParams.logprobs` asked for them.
        finish_reason: "stop" or "length".
        seed: drew this choice; with the same sampling otherwise and `n=1` it draws it again.
        num_cached_tokens: prompt tokens whose keys and values were read from the cache.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str
    seed: int
    prompt_token_ids: list[int]
    num_cached_tokens: int
    further_choices: tuple[Completion, ...] = field(default=(), repr=False)

    @property
    def choices(self) -> tuple[Completion, ...]:
        return (self, *self.further_choices)

    def __len__(self) -> int:
        return len(self.choices)

    def __getitem__(self, index: int) -> Completion:
        return self.choices[index]


class LLM:
    """A loaded model with its cache. Not thread-safe; a context manager.

    Args:
        model: a .gguf file, a Hugging Face folder, a pulled name, or None for the packaged model.
        ops: "native" kernels, or "reference", their definition in torch, which is slow.
        threads: None takes the physical cores this process may use.
        max_model_len: tokens of prompt and answer together; None takes the model's own limit.
        max_num_seqs, max_num_batched_tokens, cache_memory: None takes EngineConfig's default.
        speculative: where guesses at the next tokens come from, which never change an answer: "ngram" (the
            text so far), "draft" (`draft_model`, a smaller model), "mtp" (the model's own module), or "off".
        num_speculative_tokens: guessed at a time; None takes what suits the source.
        lora_adapters: folders of LoRA adapters by the names that `adapter` may then have.
        chat_template: a file to use instead of the model's own.
        progress: called with the bytes loaded so far, and all.

    Raises WeightsError, ConfigError, TemplateError or another ValueError that names the setting, in one line,
    and ModuleNotFoundError where `ops="reference"` finds no torch.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        ops: Literal["native", "reference"] = "native",
        threads: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        cache_memory: int | None = None,
        kv_cache_dtype: KVCacheDtype = "bf16",
        activations: Activations = "auto",
        speculative: Speculative = "off",
        num_speculative_tokens: int | None = None,
        draft_model: str | Path | None = None,
        lora_adapters: Mapping[str, str | Path] | None = None,
        chat_template: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        path = resolve_model(None if model is None else str(model))
        limits: dict[str, Any] = {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "cache_memory": cache_memory,
        }
        config = EngineConfig(
            model=str(path),
            num_threads=threads,
            max_model_len=max_model_len,
            kv_cache_dtype=kv_cache_dtype,
            activations=activations,
            speculative=speculative,
            num_speculative_tokens=num_speculative_tokens,
            draft_model=None if draft_model is None else str(resolve_model(str(draft_model))),
            lora_adapters={name: str(folder) for name, folder in (lora_adapters or {}).items()},
            **{name: value for name, value in limits.items() if value is not None},
        )
        self._frontend = load_frontend(path, chat_template)
        self._chat_format = ChatFormat.of(self._frontend.template)
        load_runner = _runner_loader(ops)
        self._engine: Engine | None = start_engine(config, load_runner, progress or (lambda *_: None))
        self._answers: dict[str, _Answer] = {}  # by request id, while they run
        self._request_ids = map(str, itertools.count())

    @property
    def ready(self) -> Ready:
        """What was settled on while loading: limits, sizes, fingerprint, and notes on automatic choices."""
        return self._open_engine().ready

    @property
    def stats(self) -> EngineStats:
        """Gauges, and counters since the start."""
        return self._open_engine().stats

    @property
    def has_chat_template(self) -> bool:
        return self._frontend.template is not None

    @property
    def default_sampling(self) -> SamplingParams:
        """What holds where no SamplingParams are given: the model's own settings, and at most 256 tokens.

        SamplingParams that are given hold as they are; begin with these by `dataclasses.replace`.
        """
        return replace(self._frontend.sampling_defaults, max_tokens=DEFAULT_MAX_TOKENS)

    def tokenize(self, text: str, *, parse_special: bool = True) -> list[int]:
        """The ids of `text`; only with `parse_special` does a control token's text become that token."""
        return self._frontend.tokenizer.encode(text, parse_special=parse_special)

    def detokenize(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `token_ids`, U+FFFD where it is no UTF-8; `skip_special` drops control tokens."""
        return self._frontend.tokenizer.decode(token_ids, skip_special=skip_special)

    def encode_chat(self, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
        """The ids of a conversation under the model's chat template, ready for the assistant's answer.

        Raises ValueError naming the field of a malformed message, TemplateError where the template refuses.
        """
        return self._frontend.encode_chat(messages, **template_kwargs)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        structured: StructuredOutput | None = None,
    ) -> list[Completion]:
        """An answer to each prompt, in order. A prompt is text or ids; `sampling` is for all, or one each.

        `adapter` names the one of `lora_adapters` that all go through. `structured` is what each answer must
        be; it alone says where one ends, whatever `sampling.stop`, and one whose finish_reason is "stop"
        is whole. Raises ValueError for an unknown adapter, a schema that cannot be followed, or a prompt that
        is empty, too long or outside the vocabulary, before anything is computed, and RuntimeError where the
        model fails on one.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        grammar = None if structured is None else Grammar(structured.grammar_text())
        return self._completions(prompts, sampling, adapter, [grammar] * len(prompts))

    def _completions(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | None,
        grammars: Sequence[Grammar | None],
    ) -> list[Completion]:
        samplings = self._samplings(sampling, len(prompts))
        answers = [
            self._answer(prompt, one, adapter, grammar)
            for prompt, one, grammar in zip(prompts, samplings, grammars, strict=True)
        ]
        with self._running(answers):
            while not all(answer.is_finished for answer in answers):
                self._step()
        return [answer.completion() for answer in answers]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        structured: StructuredOutput | None = None,
        **template_kwargs: Any,
    ) -> Any:
        """The assistant's answer to a conversation: a Completion; to a list of conversations, a list of them.

        `structured` holds what follows the thoughts, if the model thinks. `template_kwargs` are further
        variables of the chat template. Raises as `encode_chat` and `generate`.
        """
        is_single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_single else messages
        prompts = [self.encode_chat(conversation, **template_kwargs) for conversation in conversations]
        text = None if structured is None else structured.grammar_text()
        grammars = [self._chat_grammar(text, prompt, template_kwargs) for prompt in prompts]
        completions = self._completions(prompts, sampling, adapter, grammars)
        return completions[0] if is_single else completions

    def _chat_grammar(
        self, text: str | None, prompt_ids: Sequence[int], template_kwargs: Mapping[str, Any]
    ) -> Grammar | None:
        """What holds the answer to such a prompt behind its thoughts."""
        if text is None:
            return None
        tokenizer, chat_format = self._frontend.tokenizer, self._chat_format
        is_thinking = chat_format.is_thinking(
            tokenizer, prompt_ids, is_continued=bool(template_kwargs.get("continue_final_message"))
        )
        is_wanted = template_kwargs.get(chat_format.thinking_switch or "")
        ids = chat_format.thinking_ids(tokenizer, is_thinking=is_thinking, is_wanted=is_wanted)
        if ids is None:
            raise ValueError("structured: this model's thoughts do not end with a token of their own")
        opening_id, after_id = ids
        return Grammar(text, after_id, opening_id)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        structured: StructuredOutput | None = None,
        on_prefill: Progress | None = None,
    ) -> Iterator[Delta]:
        """The answer as it is drawn: deltas with `index` and `text`; a choice's last has `finish_reason`.

        `on_prefill` is called with the prompt tokens read so far, and all. Closing the iterator ends the
        request. Raises as `generate`.
        """
        sampling = self.default_sampling if sampling is None else sampling
        grammar = None if structured is None else Grammar(structured.grammar_text())
        return self._deltas(self._answer(prompt, sampling, adapter, grammar, on_prefill))

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The model's logits after each token: float32 [len(token_ids), vocab_size], one full forward.

        Nothing is read from, or left in, the prefix cache. Raises ValueError where there are no tokens, more
        than max_model_len, or ids outside the vocabulary, or where too few cache blocks are free.
        """
        self._check_ids(token_ids, max_tokens=self.ready.max_model_len)
        with _deferred_interrupts():
            return self._open_engine().logits(np.array(token_ids, np.int32))

    def close(self) -> None:
        """Free the weights and the cache; streams that still run end with RuntimeError."""
        self._answers.clear()
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def _samplings(
        self, sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> Sequence[SamplingParams]:
        if sampling is None:
            return [self.default_sampling] * num_prompts
        if isinstance(sampling, SamplingParams):
            return [sampling] * num_prompts
        if len(sampling) != num_prompts:
            raise ValueError(f"{len(sampling)} SamplingParams were given for {num_prompts} prompts")
        return sampling

    def _answer(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        adapter: str | None,
        grammar: Grammar | None,
        on_prefill: Progress | None = None,
    ) -> _Answer:
        """What will hold the answer to a prompt that can be served."""
        if adapter is not None and adapter not in dict(self.ready.adapters):
            raise ValueError(f"there is no adapter {adapter!r}")
        prompt_ids = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_ids(prompt_ids, max_tokens=self.ready.max_model_len - 1)
        seed = secrets.randbelow(_MAX_DRAWN_SEED) if sampling.seed is None else sampling.seed
        sampling = replace(sampling, seed=seed, stop=sampling.stop if grammar is None else ())
        choices = [_Choice(Choice(index, sampling, self._frontend.tokenizer)) for index in range(sampling.n)]
        starts = turn_starts(self._frontend.tokenizer, prompt_ids)
        request_id = next(self._request_ids)
        return _Answer(request_id, prompt_ids, starts, sampling, adapter, grammar, choices, on_prefill)

    def _check_ids(self, token_ids: Sequence[int], max_tokens: int) -> None:
        ready = self.ready
        if not token_ids:
            raise ValueError("the prompt has no tokens")
        if len(token_ids) > max_tokens:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, but max_model_len of {ready.max_model_len} "
                f"has room for {max_tokens}"
            )
        for token_id in token_ids:
            if not isinstance(token_id, int | np.integer) or not 0 <= token_id < ready.vocab_size:
                raise ValueError(f"token id {token_id!r} is not in the vocabulary of {ready.vocab_size}")

    @contextmanager
    def _running(self, answers: Sequence[_Answer]) -> Iterator[None]:
        """Submit the answers' requests; at the end, abort those that have not finished."""
        engine = self._open_engine()
        try:
            for answer in answers:
                self._answers[answer.request_id] = answer
                engine.submit(answer.submit())
            yield
        finally:
            for answer in answers:
                self._answers.pop(answer.request_id, None)
                engine.abort(Abort(answer.request_id))

    def _deltas(self, answer: _Answer) -> Iterator[Delta]:
        with self._running([answer]):
            while not answer.is_finished:
                self._step()
                deltas, answer.deltas = answer.deltas, []
                yield from deltas

    def _step(self) -> None:
        """One step of the engine, for all that runs; each answer takes what is its own."""
        engine = self._open_engine()
        with _deferred_interrupts():
            step = engine.step()
            for prefilling in step.prefilling:
                if answer := self._answers.get(prefilling.request_id):
                    answer.take_progress(prefilling)
            for output in step.outputs:
                if (answer := self._answers.get(output.request_id)) and answer.take(output):
                    engine.abort(Abort(output.request_id, output.index))


@dataclass(slots=True)
class _Choice:
    """One choice while it is drawn."""

    text_choice: Choice
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    num_cached_tokens: int = 0

    def take(self, output: TokenOutput) -> Delta | None:
        delta = self.text_choice.take(output)
        num_taken = self.text_choice.num_tokens - len(self.token_ids)  # fewer where a stop string ended it
        self.token_ids += output.token_ids[:num_taken]
        self.logprobs += output.logprobs[:num_taken]
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if delta is not None:
            self.text += delta.text
            self.finish_reason = delta.finish_reason or ""
        return delta


@dataclass(slots=True, eq=False)
class _Answer:
    """A request and what came of it so far."""

    request_id: str
    prompt_ids: list[int]
    turn_starts: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None
    grammar: Grammar | None
    choices: list[_Choice]
    on_prefill: Progress | None
    deltas: list[Delta] = field(default_factory=list)  # for `stream` to take
    error: str | None = None

    @property
    def is_finished(self) -> bool:
        """Raises RuntimeError where the model failed on it."""
        if self.error is not None:
            raise RuntimeError(self.error)
        return all(choice.text_choice.is_finished for choice in self.choices)

    def submit(self) -> Submit:
        sampling = replace(self.sampling, stop=())
        return Submit(
            self.request_id,
            _TENANT,
            tuple(self.prompt_ids),
            sampling,
            self.grammar,
            self.turn_starts,
            self.adapter,
        )

    def take_progress(self, prefilling: Prefilling) -> None:
        if self.on_prefill is not None:
            self.on_prefill(prefilling.num_computed_tokens, prefilling.num_prompt_tokens)

    def take(self, output: TokenOutput) -> bool:
        """Whether the engine is to stop drawing this choice."""
        choice = self.choices[output.index]
        if choice.text_choice.is_finished:
            return False
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.error = output.error or f"the request ended with {output.finish_reason}"
            return False
        if delta := choice.take(output):
            self.deltas.append(delta)
        return choice.text_choice.is_finished and output.finish_reason is None

    def completion(self) -> Completion:
        first, *further = (self._completion(index) for index in range(len(self.choices)))
        return replace(first, further_choices=tuple(further))

    def _completion(self, index: int) -> Completion:
        choice = self.choices[index]
        return Completion(
            index,
            choice.text,
            choice.token_ids,
            None if self.sampling.logprobs is None else choice.logprobs,
            choice.finish_reason,
            (self.sampling.seed or 0) + index,
            self.prompt_ids,
            choice.num_cached_tokens,
        )


def _runner_loader(ops: str) -> LoadRunner:
    if ops == "native":
        from jinn.engine.loading import load_runner

        return load_runner
    if ops != "reference":
        raise ValueError(f"ops must be one of native, reference, not {ops!r}")
    if find_spec("torch") is None:
        raise ModuleNotFoundError("ops='reference' needs torch: pip install 'jinn[reference]'")
    from jinn.engine.reference_runner import load_reference_runner

    return load_reference_runner


@contextmanager
def _deferred_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait until the block is through, so that it never finds the engine's books half written."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[Any, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[-1])
