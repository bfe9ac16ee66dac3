"""What all routes share: engine, tokenizer, the running requests, and whether new ones are taken."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from jinn.engine.messages import Grammar, Pooling, Ready, SamplingParams
from jinn.server import errors
from jinn.server.config import ServerConfig
from jinn.server.generation import ClientGoneError, Generation, GenerationRequest, Usage, cancel_when_gone
from jinn.server.grammar_compiler import GrammarCompiler
from jinn.server.interfaces import Engine
from jinn.server.metrics import Metrics
from jinn.server.reading import Reading, Vectors
from jinn.server.structured import Wanted
from jinn.text.chat_format import NO_THINKING, ChatFormat, ThinkingIds
from jinn.text.tokenizer import Tokenizer

logger = logging.getLogger("jinn.server")

T = TypeVar("T")

EncodeChat = Callable[..., Sequence[int]]  # as jinn.text.template.encode_chat, from `messages` on

StartEngine = Callable[[], Awaitable[Engine]]

RETRY_SECONDS = 5
LONG_LIFE_SECONDS = 60.0  # an engine that ran so long is restarted at once
MAX_RESTART_SECONDS = 30.0
MAX_RETRY_SECONDS = 600
CUT_SECONDS = 1.0  # to write the last words of a request that was cut
_LONG_TEXT = 16_384  # characters; a few milliseconds of tokenising


class Throughput:
    """How fast requests end, over the last of them."""

    def __init__(self) -> None:
        self._ended_at: deque[float] = deque(maxlen=32)

    def count(self) -> None:
        """A request has ended."""
        self._ended_at.append(time.monotonic())

    def seconds_for(self, num_requests: int) -> int:
        """Whole seconds until so many requests have ended, as measured; a guess where few have."""
        if len(self._ended_at) < 2:
            return RETRY_SECONDS
        seconds = (self._ended_at[-1] - self._ended_at[0]) / (len(self._ended_at) - 1)
        return min(max(math.ceil(seconds * num_requests), 1), MAX_RETRY_SECONDS)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """How the served model presents itself. `aliases` are the other names a request may use.

    Each of `adapters` is the name of a model of its own, which is this one with an adapter.
    """

    name: str
    aliases: frozenset[str]
    created: int  # Unix seconds
    adapters: tuple[str, ...] = ()

    @classmethod
    def create(cls, name: str, file_name: str, adapters: Iterable[str] = ()) -> ModelCard:
        """The card of a model that is also known by its file's name."""
        aliases = frozenset({file_name, file_name.removesuffix(".gguf")})
        return cls(name, aliases, int(time.time()), tuple(adapters))


class Service:
    """One model behind HTTP."""

    def __init__(
        self,
        config: ServerConfig,
        engine: Engine,
        tokenizer: Tokenizer,
        encode_chat: EncodeChat,
        *,
        file_name: str,
        sampling_defaults: SamplingParams | None = None,
        pooling: Pooling = Pooling.MEAN,
        card: ModelCard | None = None,
        start_engine: StartEngine | None = None,
        chat_format: ChatFormat | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.tokenizer = tokenizer
        self.encode_chat = encode_chat
        self.chat_format = chat_format or ChatFormat()
        self.sampling_defaults = sampling_defaults or SamplingParams()
        self.pooling = pooling
        self.card = card or ModelCard.create(config.served_model_name or file_name, file_name)
        self.metrics = Metrics(self.card.name, lambda: self.engine.stats)
        self._start_engine = start_engine
        self._supervisor: asyncio.Task[None] | None = None
        self._grammars = GrammarCompiler()
        self.is_draining = False
        self.ready: Ready | None = None  # what the engine said
        self._running: set[Generation | Reading] = set()
        self._throughput = Throughput()
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Wait for the engine; requests are taken from then on. Raises RuntimeError if it cannot start."""
        self.ready = await self.engine.ready()
        if self._start_engine is not None:
            self._supervisor = asyncio.create_task(self._supervise(self._start_engine))

    async def close(self) -> None:
        """End the engine, and what compiles grammars."""
        await asyncio.to_thread(self._grammars.close)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await self.engine.close()

    async def _supervise(self, start_engine: StartEngine) -> None:
        """Start the engine again whenever it ends by itself; sooner where it had lived long."""
        delay = 0.0
        while True:
            started_at = time.monotonic()
            await self.engine.ended()
            if time.monotonic() - started_at > LONG_LIFE_SECONDS:
                delay = 0.0
            logger.error("the engine has ended, and is started again in %g seconds", delay)
            await asyncio.sleep(delay)
            delay = min(max(2 * delay, 1.0), MAX_RESTART_SECONDS)
            await self.engine.close()
            try:
                self.engine = await start_engine()
                self.ready = await self.engine.ready()
                logger.info("the engine is ready again")
            except (RuntimeError, OSError) as error:
                logger.error("the engine did not start: %s", error)

    def admit(self) -> Ready:
        """What the engine said when it was ready. Raises APIError 503 while no request can be taken."""
        if self.is_draining:
            raise errors.unavailable("The server is shutting down.", RETRY_SECONDS)
        if self.ready is None:
            raise errors.unavailable("The model is still loading.", RETRY_SECONDS)
        if not self.engine.is_alive:
            raise errors.engine_down()
        return self.ready

    def name_for(self, request: Request) -> str:
        """What the answer calls the model: the adapter's name where the request goes through one."""
        adapter: str | None = request.state.adapter
        return adapter or self.card.name

    def system_fingerprint(self, request: Request) -> str:
        """What the answer's bytes depend on, the request's adapter too. Raises APIError 503."""
        ready = self.admit()
        digest = dict(ready.adapters).get(request.state.adapter)
        return f"{ready.system_fingerprint}-{digest}" if digest else ready.system_fingerprint

    def check_room(self, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams, param: str) -> None:
        """Refuse a prompt that is empty or leaves no room for an answer. Raises APIError 400 naming `param`.

        `max_tokens` may be more than the room; the engine ends such an answer with the context.
        """
        max_model_len = self.admit().max_model_len
        for prompt in prompts:
            if not prompt:
                raise errors.invalid_value(param, f"'{param}' has no tokens.")
            if len(prompt) >= max_model_len:
                raise errors.context_length_exceeded(len(prompt), max_model_len, param)
        room = max_model_len - max(map(len, prompts))
        if sampling.min_tokens > room:
            raise errors.invalid_value(
                "min_tokens", f"'min_tokens': only {room} tokens fit after the prompt."
            )

    async def run_text(self, num_characters: int, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function of the text layer; beside the event loop where the text is long."""
        if num_characters < _LONG_TEXT:
            return function(*args, **kwargs)
        return await asyncio.to_thread(function, *args, **kwargs)

    async def grammar(self, wanted: Wanted | None, thinking_ids: ThinkingIds = NO_THINKING) -> Grammar | None:
        """What holds an answer, behind its thoughts, to what is wanted. Raises APIError 400, 503."""
        if wanted is None:
            return None
        if thinking_ids is None:
            raise errors.invalid_value(
                wanted.param, f"'{wanted.param}': this model's thoughts do not end with a token of their own."
            )
        opening_id, after_id = thinking_ids
        return Grammar(await self.compile(wanted), after_id, opening_id)

    async def compile(self, wanted: Wanted) -> str:
        """The text of the grammar of what is wanted. Raises APIError 400, 503."""
        return await self._grammars.compile(wanted.kind, wanted.value, wanted.param)

    def generate(self, request: GenerationRequest) -> Generation:
        """A request about to run; it must be given to `release()` in the end. Raises APIError 429, 503."""
        self._check_queue(self.admit())
        generation = Generation(request, self.engine, self.tokenizer, self.metrics)
        self._running.add(generation)
        self._idle.clear()
        return generation

    def _check_queue(self, ready: Ready) -> None:
        num_ahead = len(self._running) - ready.max_num_seqs
        if num_ahead >= self.config.max_queue:
            raise errors.queue_full(self._throughput.seconds_for(num_ahead - self.config.max_queue + 1))

    async def embed(self, request: Request, texts: Sequence[tuple[str, str]]) -> tuple[Vectors, Usage]:
        """The pooled hidden states of texts, float64 [texts, hidden_size], and what they count.

        Each text comes behind its path in the body. Raises APIError: 400 with the path of a text that is
        empty or too long, 500, 503.
        """
        ready = self.admit()
        self._check_queue(ready)
        token_ids = []
        for param, text in texts:
            token_ids.append(await self._encode_whole(text))
            _check_text(token_ids[-1], ready.max_model_len, param)
        state = request.state
        reading = Reading(state.request_id, token_ids, self.pooling, self.engine, state.adapter)
        watcher = asyncio.create_task(cancel_when_gone(reading, request.receive))
        self._running.add(reading)
        self._idle.clear()
        try:
            vectors = await reading.vectors()
        except ClientGoneError:
            raise ClientDisconnect from None
        finally:
            watcher.cancel()
            self.release(reading)
        state.usage = reading.usage
        return vectors, reading.usage

    async def _encode_whole(self, text: str) -> tuple[int, ...]:
        """The ids of a text with all that the tokenizer puts around it; none becomes a control token."""
        ids = await self.run_text(len(text), self.tokenizer.encode, text, parse_special=False)
        return (*ids, *self.tokenizer.suffix_ids) if text else ()

    def release(self, generation: Generation | Reading) -> None:
        generation.close()
        self._running.discard(generation)
        self._throughput.count()
        if not self._running:
            self._idle.set()

    async def drain(self) -> None:
        """Take no more requests, and wait until those that run have ended, or were cut at the deadline."""
        self.is_draining = True
        try:
            async with asyncio.timeout(self.config.drain_seconds):
                await self._idle.wait()
        except TimeoutError:
            self.cut()
            with contextlib.suppress(TimeoutError):  # a client that does not read is not waited for
                await asyncio.wait_for(self._idle.wait(), CUT_SECONDS)

    def cut(self) -> None:
        """End every running request with an error."""
        for generation in list(self._running):
            generation.fail(errors.unavailable("The server is shutting down.", RETRY_SECONDS))


def _check_text(token_ids: Sequence[int], max_tokens: int, param: str) -> None:
    if not token_ids:
        raise errors.invalid_value(param, f"'{param}' has no tokens.")
    if len(token_ids) > max_tokens:
        raise errors.APIError(
            400,
            f"'{param}' has {len(token_ids)} tokens, but this model reads at most {max_tokens}.",
            param=param,
            code="context_length_exceeded",
        )
