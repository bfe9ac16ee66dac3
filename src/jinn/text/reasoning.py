"""What a model thinks before it answers: where it stands in the output, and how to read it apart."""

from __future__ import annotations

from dataclasses import dataclass

from jinn.text.cursor import NO_TAGS, Cursor, Running, Steps, Tags, each
from jinn.text.message import ContentDelta, Part, ReasoningDelta
from jinn.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The tags around the thoughts, and what closes them where the model does not."""

    start: str
    end: str
    closing: str

    def is_open(self, prompt_end: str, *, is_continued: bool) -> bool:
        """Whether a prompt that ends with this text leaves the model thinking.

        With `is_continued` the text is the beginning of the model's own message.
        """
        if is_continued:
            return prompt_end.rfind(self.start) > prompt_end.rfind(self.end)
        return prompt_end.rstrip().endswith(self.start)

    def tag_ids(self, tokenizer: Tokenizer) -> tuple[int, int] | None:
        """The ids of the tags, where each is a token of its own."""
        start, end = tokenizer.added_tokens.get(self.start), tokenizer.added_tokens.get(self.end)
        return None if start is None or end is None else (start.id, end.id)


def find_reasoning_format(template: str) -> ReasoningFormat | None:
    """The format that a chat template shows, or None: it never speaks of thoughts."""
    if "</think>" not in template:
        return None
    # Qwen's templates, and DeepSeek-R1's, put a line break after the tag; DeepSeek-V3.1's does not.
    has_lines = "<think>\n" in template or "<think>\\n" in template
    return ReasoningFormat("<think>", "</think>", "\n</think>" if has_lines else "</think>")


class ReasoningParser:
    """Splits an output into thoughts and answer, without the tags and the line breaks around them.

    Thoughts begin where the prompt opened them (`is_open`), or with a tag at the very start of the output; a
    tag further on is part of the answer.

    Attributes:
        is_reasoning: what comes next belongs to the thoughts.
        control_texts: the tags, whose text must be in what is pushed, should they be control tokens.
    """

    def __init__(self, format: ReasoningFormat, *, is_open: bool) -> None:  # noqa: A002
        self._start = format.start
        self._end = Tags(format.end)
        self._cursor = Cursor()
        self._running = Running(self._cursor, self._read(is_open=is_open))
        self.is_reasoning = is_open
        self.control_texts = (format.start, format.end)

    def push(self, text: str) -> list[Part]:
        return self._running.push(text)

    def flush(self) -> list[Part]:
        return self._running.flush()

    def _read(self, *, is_open: bool) -> Steps[None]:
        space = ""
        if not is_open:
            space = yield from self._cursor.space()
            is_open = yield from self._cursor.literal(self._start)
        if is_open:
            self.is_reasoning = True
            yield from each(_TrimmedReasoning(), self._cursor.until(self._end))
            self.is_reasoning = False
            yield from self._skip_line_breaks()
        elif space:
            yield ContentDelta(space)
        yield from each(ContentDelta, self._cursor.until(NO_TAGS))

    def _skip_line_breaks(self) -> Steps[None]:
        while (yield from self._cursor.peek()) == "\n":
            yield from self._cursor.take()


class _TrimmedReasoning:
    """Makes parts of texts, without line breaks at the start and, once all have come, at the end."""

    def __init__(self) -> None:
        self._held = 0  # line breaks
        self._has_begun = False

    def __call__(self, text: str) -> ReasoningDelta | None:
        core = text.rstrip("\n")
        num_breaks = len(text) - len(core)
        if not core:
            self._held += num_breaks
            return None
        text = "\n" * self._held + core if self._has_begun else core.lstrip("\n")
        self._held, self._has_begun = num_breaks, True
        return ReasoningDelta(text)
