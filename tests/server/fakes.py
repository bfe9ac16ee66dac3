"""An engine and a tokenizer small enough to know every answer in advance."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from jinn.engine.client import Sink
from jinn.engine.messages import (
    Abort,
    EngineStats,
    FinishReason,
    Prefilling,
    Ready,
    Score,
    ScoreOutput,
    Submit,
    TokenLogprobs,
    TokenOutput,
)
from jinn.text.tokenizer import AddedToken

EOS = 256
VOCAB_SIZE = 300
MAX_MODEL_LEN = 4096
ANSWER = "Paris, and the Seine: café 😀!"


class ByteTokenizer:
    """One token per byte of UTF-8."""

    special_ids = frozenset({EOS})
    added_tokens: ClassVar[dict[str, AddedToken]] = {}
    suffix_ids: tuple[int, ...] = ()

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool | None = None) -> list[int]:
        bos = [EOS] if add_bos is not False and text.startswith("<bos>") else []
        return bos + list(text.encode())

    bos_token_id = None
    eos_token_ids = (ord("."),)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b""


def encode_chat(messages: Sequence[Mapping[str, str]], **variables: object) -> list[int]:
    if messages[0]["content"] == "refuse":
        raise ValueError("the template does not take this conversation")
    return list("".join(f"{m['role']}:{m['content']}\n" for m in messages).encode())


class FakeEngine:
    """Says ANSWER, one byte a step, then the end-of-sequence id; a bot that never tires where `ignore_eos`.

    `step_seconds=None` stops time: steps then come from `step()` alone.
    """

    def __init__(self, *, step_seconds: float | None = 0.0, prefill_seconds: float = 0.0) -> None:
        self.step_seconds = step_seconds
        self.prefill_seconds = prefill_seconds
        self.is_alive = True
        self.submitted: list[Submit] = []
        self.scored: list[Score] = []
        self.aborted: list[Abort] = []
        self.running: dict[tuple[str, int], _Running] = {}
        self.fail_at: int | None = None  # the position whose token is an error
        self.answer = list(ANSWER.encode())
        self._ticker: asyncio.Task[None] | None = None
        self.num_generation_tokens = 0

    async def ready(self) -> Ready:
        return Ready(MAX_MODEL_LEN, 64, VOCAB_SIZE, 1000, 32, (EOS,), "fp_fake", ())

    async def ended(self) -> None:
        while self.is_alive:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.is_alive = False

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_blocks=1000,
            num_used_blocks=10 * len(self.running),
            num_generation_tokens=self.num_generation_tokens,
        )

    def submit(self, request: Submit | Score, sink: Sink) -> None:
        if isinstance(request, Score):
            self.scored.append(request)
            asyncio.get_running_loop().call_later(self.prefill_seconds, sink, score_output(request))
            return
        self.submitted.append(request)
        sink(Prefilling(request.request_id, 3, len(request.prompt_ids), 3))
        for index in range(request.sampling.n):
            self.running[request.request_id, index] = _Running(request, index, sink)
        if self.step_seconds is not None and (self._ticker is None or self._ticker.done()):
            self._ticker = asyncio.create_task(self._run())

    def abort(self, request: Abort) -> None:
        self.aborted.append(request)
        for key in list(self.running):
            if key[0] == request.request_id and request.index in (None, key[1]):
                del self.running[key]

    def step(self) -> None:
        """One token for every running choice."""
        for key, running in list(self.running.items()):
            output = self._next_output(running)
            self.num_generation_tokens += 1
            if output.finish_reason is not None:
                self.running.pop(key, None)
            running.sink(output)

    async def _run(self) -> None:
        await asyncio.sleep(self.prefill_seconds)
        while self.running:
            self.step()
            await asyncio.sleep(self.step_seconds or 0)

    def _next_output(self, running: _Running) -> TokenOutput:
        position, sampling = running.position, running.request.sampling
        running.position += 1
        output = TokenOutput(running.request.request_id, running.index, (), num_cached_tokens=3)
        if position == self.fail_at:
            return replace(output, finish_reason=FinishReason.ERROR, error="secret detail 0x7f00dead")
        if position >= len(self.answer) and not sampling.ignore_eos:
            token_id, reason = EOS, FinishReason.STOP
        else:
            token_id = self.answer[position % len(self.answer)]
            is_last = sampling.max_tokens is not None and position + 1 >= sampling.max_tokens
            reason = FinishReason.LENGTH if is_last else None
        logprobs = ()
        if sampling.logprobs is not None:
            top = tuple((token_id + i, -0.5 - i) for i in range(sampling.logprobs))
            logprobs = (TokenLogprobs(-0.5, top),)
        return replace(output, token_ids=(token_id,), logprobs=logprobs, finish_reason=reason)


def score_output(request: Score) -> ScoreOutput:
    """-1 for every token, then -2, -3, ...; as an embedding, how often each of 8 remainders occurs."""
    if request.pooling is not None:
        counts = [sum(token_id % 8 == i for token_id in request.token_ids) for i in range(8)]
        return ScoreOutput(request.request_id, embedding=tuple(map(float, counts)))
    targets = request.token_ids[1:]
    top = [tuple((i + k, -1.0 - k) for k in range(request.num_logprobs or 0)) for i in targets]
    return ScoreOutput(request.request_id, tuple(TokenLogprobs(-1.0, entries) for entries in top))


class _Running:
    def __init__(self, request: Submit, index: int, sink: Sink) -> None:
        self.request = request
        self.index = index
        self.sink = sink
        self.position = 0
