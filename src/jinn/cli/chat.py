"""`jinn chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from jinn.cli.options import LoraOption, MaxTokensOption, ModelArgument, ThreadsOption, parse_adapter
from jinn.cli.progress import Update, progress_bar
from jinn.engine.messages import SamplingParams

if TYPE_CHECKING:
    from jinn.llm import LLM

_TEMPERATURE = 0.7  # where the model names no way to sample

HELP = "/clear forgets the conversation, /exit ends it; Ctrl-C stops an answer."

# A model's output must not steer the terminal: control characters go, but for tab and newline.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def chat(
    model: ModelArgument = None,
    max_tokens: MaxTokensOption = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 takes the most likely token each time.",
            show_default=f"the model's own, or {_TEMPERATURE}",
        ),
    ] = None,
    lora: LoraOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Talk to a model."""
    adapter, lora_adapters = parse_adapter(lora or ())
    from jinn.llm import LLM

    with progress_bar("Loading", is_bytes=True) as on_load:
        llm = LLM(model, threads=threads, lora_adapters=lora_adapters, progress=on_load)
    if not llm.has_chat_template:
        raise ValueError("this model has no chat template; jinn generate --raw goes without")
    converse(Conversation(llm, max_tokens, temperature, adapter))


def converse(conversation: Conversation) -> None:
    """Answer what is typed, until /exit or the end of the input."""
    _note(HELP)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/clear":
            conversation.clear()
        elif line.startswith("/"):
            _note(HELP)
        elif line:
            _answer(conversation, line)


class Conversation:
    """What was said so far. Each turn's prompt begins with the one before, which the cache still has."""

    def __init__(
        self,
        llm: LLM,
        max_tokens: int | None = None,
        temperature: float | None = None,
        adapter: str | None = None,
    ) -> None:
        self._llm = llm
        self._adapter = adapter
        sampling = replace(llm.default_sampling, max_tokens=max_tokens)
        if temperature is None and sampling == SamplingParams(max_tokens=max_tokens):
            temperature = _TEMPERATURE
        self._sampling = replace(
            sampling, temperature=sampling.temperature if temperature is None else temperature
        )
        self.messages: list[dict[str, str]] = []

    def clear(self) -> None:
        self.messages.clear()

    def say(self, text: str, on_prefill: Update | None = None) -> Generator[str]:
        """The answer in pieces; it joins the conversation, as far as it was drawn, when the generator ends.

        Raises ValueError where the conversation does not fit the model, and is then as before.
        """
        question = {"role": "user", "content": text}
        prompt_ids = self._llm.encode_chat([*self.messages, question])
        answer = ""
        try:
            deltas = self._llm.stream(
                prompt_ids, self._sampling, adapter=self._adapter, on_prefill=on_prefill
            )
            for delta in deltas:
                answer += delta.text
                yield delta.text
        finally:
            if answer:
                self.messages += (question, {"role": "assistant", "content": answer})


def _answer(conversation: Conversation, text: str) -> None:
    """Print the answer as it comes; Ctrl-C ends it."""
    try:
        with progress_bar("Reading") as on_prefill:
            pieces = conversation.say(text, on_prefill)
            first = next(pieces, "")
        with contextlib.closing(pieces):
            for piece in itertools.chain([first], pieces):
                sys.stdout.write(piece.translate(_CONTROLS))
                sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        _note(str(error))
    print()


def _lines() -> Iterator[str]:
    """What is typed, line by line."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  (gives input() a history and editing)
    while True:
        try:
            yield input("> " if is_terminal else "").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def _note(text: str) -> None:
    typer.secho(text, dim=True, err=True)
