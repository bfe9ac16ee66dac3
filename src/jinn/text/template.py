"""Chat templates: a conversation to the text, and to the token ids, that a model was trained on."""

from __future__ import annotations

import functools
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes

from jinn.text.allowance import AllowanceError
from jinn.text.conversation import (
    Messages,
    plain_messages,
    with_content,
    with_one_system_message,
    with_parsed_arguments,
)
from jinn.text.marks import Marker
from jinn.text.sandbox import MAX_SOURCE_CHARS, Sandbox
from jinn.text.tokenizer import Tokenizer

_FILE_NAME = "<template>"  # jinja's name for a source without a file
_MAX_REASON_CHARS = 300
_REPR = re.compile(r"<[^<>]* at 0x[0-9a-f]+>|<(?:class|built-in|Macro|LoopContext)\b[^<>]*>")


class TemplateError(ValueError):
    """A chat template is missing, is no template, or does not take these messages."""


class TemplateWorkError(TemplateError):
    """A chat template does more work than its messages allow."""


class ChatTemplate:
    """A model's chat templates: `default`, and others by name; `tool_use` is taken when there are tools.

    Raises TemplateError where a source does not compile.
    """

    def __init__(self, source: str | Mapping[str, str]) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in sources:
            raise TemplateError(f"no chat template is named 'default', only {sorted(sources)}")
        self._sources = sources
        self._compiled = {name: _compile(text) for name, text in sources.items()}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ChatTemplate | None:
        """The template in a GGUF's metadata, or None."""
        prefix = "tokenizer.chat_template"
        if prefix not in metadata:
            return None
        named = {
            key[len(prefix) + 1 :]: text for key, text in metadata.items() if key.startswith(f"{prefix}.")
        }
        return cls({**named, "default": metadata[prefix]})

    @classmethod
    def from_folder(cls, path: str | Path) -> ChatTemplate | None:
        """chat_template.jinja, or what tokenizer_config.json has, one or a list with names; or None."""
        folder = Path(path)
        file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"))
        source = (
            json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
        )
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}
        return None if source is None else cls(source)

    @functools.cached_property
    def text(self) -> str:
        """The sources, one after the other."""
        return "\n".join(self._sources.values())

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The names that the templates read and do not set themselves: what `kwargs` may give."""
        names: set[str] = set()
        for source in self._sources.values():
            names |= meta.find_undeclared_variables(_sandbox().parse(source))
        return frozenset(names - _sandbox().globals.keys())

    @functools.cached_property
    def takes_text_arguments(self) -> bool:
        """Whether the arguments of a call may be JSON text; else they must be an object."""
        arguments = '{"jinn": "probe"}'
        call = {"id": "0", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        calling = {"role": "assistant", "tool_calls": [call]}
        conversation: Messages = [{"role": "user", "content": "probe"}, calling]
        try:
            return arguments in _render_any(self.render, conversation)
        except TemplateError:
            return False

    @functools.cached_property
    def words(self) -> frozenset[str]:
        """The names and literal strings of the templates: what they may compare text with or look up by."""
        words: set[str] = set()
        for source in self._sources.values():
            tree = _sandbox().parse(source)
            words.update(node.attr for node in tree.find_all(nodes.Getattr))
            for constant in tree.find_all(nodes.Const):
                if isinstance(constant.value, str):
                    words.update((constant.value, *constant.value.split(".")))
        return frozenset(words)

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        bos_token: str = "",
        eos_token: str = "",
        **kwargs: Any,
    ) -> str:
        """The conversation as text. `kwargs` are further variables of the template (`enable_thinking`).

        Raises TemplateError where the template refuses or fails, or does more work than allowance.py grants.
        """
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        variables = {"documents": None, "bos_token": bos_token, "eos_token": eos_token, **kwargs}
        try:
            return self._compiled[name].render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:
            raise _failure(error) from None


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **kwargs: Any,
) -> list[int]:
    """The conversation as token ids, in which every control token is the template's own.

    What the messages, tools and `kwargs` hold stays text, though it spell an added token; only assistant
    messages may use the tokens that are text themselves (`<think>`, `<tool_call>`). For other conversations
    these are the ids of transformers' `apply_chat_template(tokenize=True)`.

    With `continue_final_message` the ids end within the last message, for the model to go on with it. Where
    the template does not take the conversation as it is, system messages are merged into the first, and
    arguments of calls change between text and object; see conversation.py.

    Raises ValueError naming the field where a message is malformed, TemplateError as `ChatTemplate.render`.
    """
    if template is None:
        raise TemplateError("this model has no chat template; give one with --chat-template")
    try:
        plain = plain_messages(messages)
        if any("tool_calls" in message for message in plain) and not template.takes_text_arguments:
            plain = with_parsed_arguments(plain)
        if continue_final_message and not (plain[-1]["role"] == "assistant" and plain[-1].get("content")):
            raise ValueError("the last message is not the assistant's, or has no content to continue")
        return _encode_marked(
            tokenizer,
            template,
            plain,
            {**kwargs, "tools": tools},
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            is_continued=continue_final_message,
        )
    except RecursionError:
        raise ValueError("messages or tools nest too deeply") from None


def _encode_marked(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    variables: dict[str, Any],
    *,
    add_generation_prompt: bool,
    is_continued: bool,
) -> list[int]:
    marker = Marker(tokenizer.added_tokens, template.words, (messages, variables))
    fixed = {name: marker.mark(value) for name, value in variables.items()}

    def render(messages: Messages) -> str:
        marked = [marker.mark_message(message) for message in messages]
        if is_continued:
            marked[-1] = marker.mark_end(marked[-1])
        return template.render(
            marked,
            add_generation_prompt=add_generation_prompt,
            bos_token=_token_text(tokenizer, tokenizer.bos_token_id),
            eos_token=_token_text(tokenizer, next(iter(tokenizer.eos_token_ids), None)),
            **fixed,
        )

    try:
        rendered = _render_any(render, messages)
    except TemplateError as error:  # it may quote what was marked
        raise type(error)(marker.strip(str(error))) from None
    if is_continued:
        continued = marker.cut(rendered)
        if continued is None:
            raise TemplateError("chat template: it does not show the end of the message to continue")
        rendered = continued
    spans = [marker.strip(span) if isinstance(span, str) else span for span in tokenizer.split(rendered)]
    return tokenizer.encode_spans(spans)


def _render_any(render: Callable[[Messages], str], messages: Messages) -> str:
    """Render; where the template refuses, try other forms of the same conversation.

    A message that only calls may have no content, null or "", and system messages may be merged into one.
    Raises what the conversation as it is raised.
    """
    refusal: TemplateError | None = None
    for form in _forms(messages):
        try:
            return render(form)
        except TemplateWorkError:
            raise
        except TemplateError as error:
            refusal = refusal or error
    raise refusal or TemplateError("there is nothing to render")


def _forms(messages: Messages) -> Iterator[Messages]:
    for form in (messages, with_one_system_message(messages)):
        if form is None:
            return
        yield form
        if any("content" not in message for message in form):
            yield with_content(form, None)
            yield with_content(form, "")


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox()


def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE_CHARS:
        raise TemplateError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE_CHARS}")
    try:
        return _sandbox().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from None
    except (
        jinja2.TemplateError,
        SyntaxError,
        RecursionError,
        MemoryError,
        OverflowError,
        ValueError,
    ) as error:
        raise TemplateError(f"the chat template does not compile: {_reason(error)}") from None


def _failure(error: Exception) -> TemplateError:
    kind = TemplateWorkError if isinstance(error, AllowanceError) else TemplateError
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == _FILE_NAME]
    place = f", line {lines[-1]}" if lines else ""
    return kind(f"chat template{place}: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    reason = (error.message if isinstance(error, jinja2.TemplateError) else str(error)) or "it failed"
    reason = _REPR.sub("a value", reason)
    return reason if len(reason) <= _MAX_REASON_CHARS else f"{reason[:_MAX_REASON_CHARS]}…"


def _token_text(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token_bytes(token_id).decode("utf-8", "replace")
