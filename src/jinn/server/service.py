"""What all routes share: engine, tokenizer, the running requests, and whether new ones are taken."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jinn.engine.messages import Ready, SamplingParams
from jinn.server import errors
from jinn.server.config import ServerConfig
from jinn.server.generation import Generation, GenerationRequest
from jinn.server.interfaces import Engine
from jinn.server.metrics import Metrics
from jinn.text.tokenizer import Tokenizer

T = TypeVar("T")

EncodeChat = Callable[[Sequence[Mapping[str, str]]], Sequence[int]]  # ValueError: the template refused

RETRY_SECONDS = 5
CUT_SECONDS = 1.0  # to write the last words of a request that was cut
_LONG_TEXT = 16_384  # characters; a few milliseconds of tokenising


@dataclass(frozen=True, slots=True)
class ModelCard:
    """How the served model presents itself. `aliases` are the other names a request may use."""

    name: str
    aliases: frozenset[str]
    created: int  # Unix seconds

    def check_name(self, model: str) -> None:
        """Raises APIError 404."""
        if model != self.name and model not in self.aliases:
            raise errors.model_not_found(model)


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
    ) -> None:
        self.config = config
        self.engine = engine
        self.tokenizer = tokenizer
        self.encode_chat = encode_chat
        self.sampling_defaults = sampling_defaults or SamplingParams()
        name = config.served_model_name or file_name
        stem = file_name.removesuffix(".gguf")
        self.card = ModelCard(name, frozenset({file_name, stem, "default"}), int(time.time()))
        self.metrics = Metrics(name, lambda: engine.stats)
        self.is_draining = False
        self.ready: Ready | None = None  # what the engine said
        self._running: set[Generation] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Wait for the engine; requests are taken from then on. Raises RuntimeError if it cannot start."""
        self.ready = await self.engine.ready()

    def admit(self) -> Ready:
        """What the engine said when it was ready. Raises APIError 503 while no request can be taken."""
        if self.is_draining:
            raise errors.unavailable("The server is shutting down.", RETRY_SECONDS)
        if self.ready is None:
            raise errors.unavailable("The model is still loading.", RETRY_SECONDS)
        if not self.engine.is_alive:
            raise errors.engine_down()
        return self.ready

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

    def ignored_fields(self) -> list[str] | None:
        """Where to collect the names of unknown fields; None where they are refused."""
        return [] if self.config.tolerate_unknown_fields else None

    async def run_text(self, num_characters: int, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function of the text layer; beside the event loop where the text is long."""
        if num_characters < _LONG_TEXT:
            return function(*args, **kwargs)
        return await asyncio.to_thread(function, *args, **kwargs)

    def generate(self, request: GenerationRequest) -> Generation:
        """A request about to run; it must be given to `release()` in the end. Raises APIError 503."""
        self.admit()
        generation = Generation(request, self.engine, self.tokenizer, self.metrics)
        self._running.add(generation)
        self._idle.clear()
        return generation

    def release(self, generation: Generation) -> None:
        generation.close()
        self._running.discard(generation)
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
