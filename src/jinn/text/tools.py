"""Tool calls in a model's output, whatever its family's format, and which format that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jinn.text.cursor import NO_TAGS, Cursor, Running, Steps, Wait, each
from jinn.text.message import ContentDelta, Part
from jinn.text.tool_formats.calls import CallReader, Tool, ToolFormat, make_call_id
from jinn.text.tool_formats.deepseek import DeepSeekFormat
from jinn.text.tool_formats.hermes import HermesFormat
from jinn.text.tool_formats.qwen_xml import QwenXmlFormat

TOOL_FORMATS: dict[str, ToolFormat] = {
    tool_format.name: tool_format
    for tool_format in (
        QwenXmlFormat(),
        HermesFormat(),
        DeepSeekFormat("deepseek_v3", has_fence=True),
        DeepSeekFormat("deepseek_v31", has_fence=False),
    )
}


def find_tool_format(template: str) -> ToolFormat | None:
    """The format in which a chat template writes calls, or None: it writes none that is known."""
    return next((known for known in TOOL_FORMATS.values() if known.is_shown_in(template)), None)


class ToolParser:
    """Splits an answer into content and calls.

    What is no well-formed call stays content, tags and all. Only white space next to a call is dropped.
    Arguments are passed on as the model wrote them: they may be no JSON, or cut.

    Attributes:
        num_calls: that have started.
        is_finished: nothing more is read, since one call was asked for and has come.
        control_texts: control tokens whose text must be in what is pushed.
    """

    def __init__(
        self,
        format: ToolFormat,  # noqa: A002
        tools: Sequence[Tool],
        *,
        parallel: bool = True,
        come_first: bool = False,
        make_id: Callable[[], str] = make_call_id,
    ) -> None:
        """With `come_first` an answer that does not begin with a call is content, whatever it holds."""
        cursor = Cursor()
        self._format = format
        self._calls = CallReader(cursor, tools, make_id)
        self._parallel = parallel
        self._come_first = come_first
        self.control_texts = format.control_texts
        self._running = Running(cursor, self._read())
        self._held_space: list[str] = []
        self._is_after_call = False

    @property
    def num_calls(self) -> int:
        return self._calls.num_started

    @property
    def is_finished(self) -> bool:
        return not self._parallel and self._calls.num_ended > 0

    def push(self, text: str) -> list[Part]:
        return list(self._without_space(self._running.push(text)))

    def flush(self) -> list[Part]:
        parts = list(self._without_space(self._running.flush()))
        if self._held_space and not self._is_after_call:
            parts.append(ContentDelta("".join(self._held_space)))
        return parts

    def _read(self) -> Steps[None]:
        """Content and calls in turn, until the end of the text, or of the only call."""
        calls = self._calls
        if self._come_first and not (yield from self._begins_with_call()):
            yield from each(ContentDelta, calls.cursor.until(NO_TAGS))
        while opening := (yield from each(ContentDelta, calls.cursor.until(self._format.openings))):
            for_one = self._format.read(calls, opening)
            while not self.is_finished:
                try:
                    yield next(for_one)
                except StopIteration:
                    break
            if self.is_finished:
                return

    def _begins_with_call(self) -> Wait[bool]:
        """Whether an opening comes next; stay before it."""
        cursor = self._calls.cursor
        for opening in self._format.openings.texts:
            cursor.mark()
            is_next = yield from cursor.literal(opening)
            cursor.rewind()
            if is_next:
                return True
        return False

    def _without_space(self, parts: Iterable[Part]) -> Iterable[Part]:
        """The parts without white space before, inside and after calls, which waits for what follows it."""
        held = self._held_space
        for part in parts:
            if not isinstance(part, ContentDelta):
                held.clear()
                self._is_after_call = True
                yield part
            elif core := part.text.rstrip():
                text = "".join((*held, core))
                held[:] = [part.text[len(core) :]]
                self._is_after_call = False
                yield ContentDelta(text)
            else:
                held.append(part.text)
