"""One request on its way through the engine: prompts in, one stream of deltas out, whatever the API."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn, Protocol

from starlette.requests import Request
from starlette.types import Receive

from jinn.engine.client import EngineOutput
from jinn.engine.messages import (
    GRAMMAR_ERROR,
    Abort,
    FinishReason,
    Grammar,
    Prefilling,
    SamplingParams,
    Score,
    ScoreOutput,
    Submit,
    TokenLogprobs,
    TokenOutput,
)
from jinn.engine.messages import Failed as EngineFailed
from jinn.server import errors
from jinn.server.interfaces import Engine
from jinn.server.metrics import Metrics, Phase
from jinn.text.choice import Choice, Delta, TokenEntry, echoed_entries
from jinn.text.message_parser import MessageParser
from jinn.text.tokenizer import Tokenizer
from jinn.text.turns import turn_starts

logger = logging.getLogger("jinn.server")

PING_SECONDS = 10.0  # proxies cut a connection that is silent for a minute


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What every API's body becomes. Choice `i` of prompt `p` is choice `p * sampling.n + i` of the answer.

    `sampling` has its seed set, and may hold stop strings, which mean nothing where there is a grammar: that
    alone says where an answer ends. `echoes` has the text of each prompt where the choices are to begin with
    it; with log-probabilities, then, if the sampling asks for any. `make_parser` makes what reads a choice as
    a message; without it a choice is text.
    """

    request_id: str
    tenant: str
    arrived_at: float  # time.monotonic()
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    echoes: tuple[str, ...] | None = None
    make_parser: Callable[[], MessageParser] | None = None
    grammar: Grammar | None = None
    adapter: str | None = None  # of those of the model

    @classmethod
    def create(
        cls,
        request: Request,
        prompts: tuple[tuple[int, ...], ...],
        sampling: SamplingParams,
        echoes: tuple[str, ...] | None = None,
        make_parser: Callable[[], MessageParser] | None = None,
        grammar: Grammar | None = None,
    ) -> GenerationRequest:
        state = request.state
        return cls(
            state.request_id,
            state.tenant,
            state.arrived_at,
            prompts,
            sampling,
            echoes,
            make_parser,
            grammar,
            state.adapter,
        )


@dataclass(slots=True)
class Usage:
    """Token counts over all prompts and choices; a prompt counts once, however many choices it has."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    draft_tokens: int = 0  # guessed and checked, and
    accepted_tokens: int = 0  # that were right
    reasoning_tokens: int = 0  # of the completion tokens


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """How far one prompt of a request has been read."""

    prompt: int  # its index
    num_computed_tokens: int  # those from the cache included
    num_cached_tokens: int
    num_prompt_tokens: int
    seconds: float  # since the request arrived


class ClientGoneError(Exception):
    """The client left; there is nobody to answer."""


class Cancellable(Protocol):
    """What runs for a client."""

    def cancel(self) -> None:
        """The client left."""
        ...


async def cancel_when_gone(running: Cancellable, receive: Receive) -> None:
    """Watch a client whose body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    running.cancel()


class Generation:
    """A request that runs while `deltas()` is iterated, once. Always `close()` it.

    Attributes:
        tells_progress: `deltas()` also wakes up where a prompt was read further; see `take_progress`.
    """

    def __init__(
        self, request: GenerationRequest, engine: Engine, tokenizer: Tokenizer, metrics: Metrics
    ) -> None:
        self.request = request
        self.tells_progress = False
        self._progress: list[PromptProgress] = []
        self._engine = engine
        self._metrics = metrics
        self._timer = metrics.start_request(request.arrived_at)
        num_choices = len(request.prompts) * request.sampling.n
        sampling = request.sampling if request.grammar is None else replace(request.sampling, stop=())
        self._tokenizer = tokenizer
        self._choices = [
            Choice(
                index,
                sampling,
                tokenizer,
                len(self._echo(index // request.sampling.n)),
                request.make_parser() if request.make_parser else None,
            )
            for index in range(num_choices)
        ]
        self._num_unfinished = num_choices
        self._cached_tokens = [0] * len(request.prompts)
        self._unsent_echoes = set(range(len(request.prompts))) if request.echoes else set()
        self._echo_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}  # by prompt
        self._num_draft_tokens = self._num_accepted_tokens = 0
        self._inbox: list[tuple[int, EngineOutput]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._failure: Exception | None = None
        self._ping: asyncio.TimerHandle | None = None

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(map(len, self.request.prompts)),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=sum(self._cached_tokens),
            draft_tokens=self._num_draft_tokens,
            accepted_tokens=self._num_accepted_tokens,
            reasoning_tokens=sum(choice.num_reasoning_tokens for choice in self._choices),
        )

    @property
    def phases(self) -> list[Phase]:
        """How the request spent its time."""
        return self._timer.phases

    def _start(self) -> None:
        self._schedule_ping()
        num_logprobs = self.request.sampling.logprobs if self.request.echoes else None
        for prompt, prompt_ids in enumerate(self.request.prompts):
            if num_logprobs is None:
                self._submit(prompt)
            else:
                score = Score(self._score_id(prompt), prompt_ids, num_logprobs, None, self.request.adapter)
                self._engine.submit(score, partial(self._receive, prompt))

    def _submit(self, prompt: int) -> None:
        sampling = replace(self.request.sampling, stop=())
        request, prompt_ids = self.request, self.request.prompts[prompt]
        submit = Submit(
            self._engine_id(prompt),
            request.tenant,
            prompt_ids,
            sampling,
            request.grammar,
            turn_starts=turn_starts(self._tokenizer, prompt_ids),
            adapter=request.adapter,
        )
        self._engine.submit(submit, partial(self._receive, prompt))

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """The deltas of each wake-up, until every choice has finished; an empty list every PING_SECONDS, and
        where there is progress to take.

        Raises APIError if the engine fails on the request, ClientGoneError after `cancel()`.
        """
        self._start()
        while self._num_unfinished:
            outputs = await self._next_outputs()
            deltas = self._take(outputs)
            if deltas or not outputs or self._progress:
                yield deltas

    def take_progress(self) -> list[PromptProgress]:
        """What has been read since it was asked for last."""
        progress, self._progress = self._progress, []
        return progress

    def cancel(self) -> None:
        """The client left: free what the request holds."""
        self.fail(ClientGoneError())

    def fail(self, error: Exception) -> None:
        """End `deltas()` with this error, and free what the request holds."""
        if self._failure is None and self._num_unfinished:
            self._failure = error
            self._abort_unfinished()
            self._wake()

    def close(self) -> None:
        """Free what the request still holds, and record how it went."""
        if self._num_unfinished and self._failure is None:
            self._failure = ClientGoneError()
            self._abort_unfinished()
        if self._ping is not None:
            self._ping.cancel()
        self._timer.finish()
        is_gone = isinstance(self._failure, ClientGoneError)
        for _ in range(self._num_unfinished):
            self._metrics.count_finish("abort" if is_gone else "error")

    def _engine_id(self, prompt: int) -> str:
        return f"{self.request.request_id}-{prompt}"

    def _score_id(self, prompt: int) -> str:
        return f"{self._engine_id(prompt)}-echo"

    def _echo(self, prompt: int) -> str:
        return self.request.echoes[prompt] if self.request.echoes else ""

    def _echoed(self, prompt: int) -> list[Delta]:
        """What the choices of a prompt begin with, once, and not before it is sure that something follows."""
        if prompt not in self._unsent_echoes:
            return []
        self._unsent_echoes.remove(prompt)
        text, num_choices = self._echo(prompt), self.request.sampling.n
        entries: tuple[TokenEntry, ...] = ()
        if prompt in self._echo_logprobs:
            prompt_ids, logprobs = self.request.prompts[prompt], self._echo_logprobs.pop(prompt)
            entries = echoed_entries(text, prompt_ids, logprobs, self._tokenizer)
        indices = range(prompt * num_choices, (prompt + 1) * num_choices)
        return [Delta(index, text, entries) for index in indices]

    def _receive(self, prompt: int, output: EngineOutput) -> None:
        if not isinstance(output, EngineFailed):
            self._timer.computed(self._engine.stats.step_seconds)
        self._inbox.append((prompt, output))
        self._wake()

    def _schedule_ping(self) -> None:
        self._ping = asyncio.get_running_loop().call_later(PING_SECONDS, self._wake_to_ping)

    def _wake_to_ping(self) -> None:
        self._wake()
        self._schedule_ping()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _next_outputs(self) -> list[tuple[int, EngineOutput]]:
        if not self._inbox and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        if self._failure is not None:
            raise self._failure
        outputs, self._inbox = self._inbox, []
        return outputs

    def _take(self, outputs: list[tuple[int, EngineOutput]]) -> list[Delta]:
        deltas: list[Delta] = []
        for prompt, output in outputs:
            if isinstance(output, TokenOutput):
                delta = self._take_tokens(prompt, output)
                deltas += self._echoed(prompt)
                if delta is not None:
                    deltas.append(delta)
            elif isinstance(output, ScoreOutput):
                if output.error is not None:
                    self._raise_engine_error(output.error)
                self._echo_logprobs[prompt] = output.logprobs
                self._submit(prompt)
            elif isinstance(output, Prefilling):
                if self.tells_progress:
                    self._progress.append(self._progress_of(prompt, output))
            elif isinstance(output, EngineFailed):
                logger.error("the engine failed", extra={"request_id": self.request.request_id})
                self._raise(errors.engine_down())
        return deltas

    def _progress_of(self, prompt: int, output: Prefilling) -> PromptProgress:
        return PromptProgress(
            prompt,
            output.num_computed_tokens,
            output.num_cached_tokens,
            output.num_prompt_tokens,
            time.monotonic() - self.request.arrived_at,
        )

    def _take_tokens(self, prompt: int, output: TokenOutput) -> Delta | None:
        choice = self._choices[prompt * self.request.sampling.n + output.index]
        if choice.is_finished:
            return None
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self._raise_engine_error(output.error or output.finish_reason)
        self._cached_tokens[prompt] = max(self._cached_tokens[prompt], output.num_cached_tokens)
        self._num_draft_tokens += output.num_draft_tokens
        self._num_accepted_tokens += output.num_accepted_tokens
        self._timer.tokens_arrived(choice.index, len(output.token_ids))
        delta = choice.take(output)
        if delta is not None and delta.finish_reason is not None:
            self._num_unfinished -= 1
            self._metrics.count_finish(delta.finish_reason)
            if output.finish_reason is None:
                self._engine.abort(Abort(self._engine_id(prompt), output.index))
        return delta

    def _raise_engine_error(self, error: str) -> NoReturn:
        logger.error("generation failed: %s", error, extra={"request_id": self.request.request_id})
        if self.request.grammar is not None and error.startswith(GRAMMAR_ERROR):
            self._raise(errors.grammar_failed())
        self._raise(errors.internal_error())

    def _raise(self, error: Exception) -> NoReturn:
        self.fail(error)
        raise error

    def _abort_unfinished(self) -> None:
        num_choices = self.request.sampling.n
        for prompt in range(len(self.request.prompts)):
            choices = self._choices[prompt * num_choices : (prompt + 1) * num_choices]
            if not all(choice.is_finished for choice in choices):
                self._engine.abort(Abort(self._engine_id(prompt)))
                if self.request.echoes:
                    self._engine.abort(Abort(self._score_id(prompt)))
