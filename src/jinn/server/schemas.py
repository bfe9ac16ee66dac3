"""What a body may hold: one model per API, from checked JSON to typed fields.

Ranges come from limits.py, and every parameter that is not a field here stands in parameters.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    WithJsonSchema,
)

from jinn.engine.messages import SamplingParams
from jinn.server import errors
from jinn.server.body import join_path
from jinn.server.limits import LIMITS, MAX_CHOICES, field_arguments
from jinn.server.parameters import (
    ACCEPTED,
    ACCEPTED_MESSAGE,
    REFUSED_CHAT,
    REFUSED_COMPLETION,
    REFUSED_MESSAGE,
    Columns,
    take_implemented,
)
from jinn.server.structured import Strict, StructuredFields, Wanted
from jinn.server.turns import TurnRequest
from jinn.server.wire import tool_call_fields
from jinn.text.grammar.grammars import GrammarKind

Model = TypeVar("Model", bound=BaseModel)

MAX_DRAWN_SEED = 2**53 - 256  # a drawn seed, plus a choice's index, survives JavaScript's numbers


def limited(field: str, description: str, default: Any = None) -> Any:
    return Field(default=default, description=description, **field_arguments(field))


TokenId = Annotated[int, Field(**field_arguments("token_id"))]
# At the first bad id it fails: a million bad ids would be a million error objects.
TokenIdList = Annotated[list[TokenId], Field(fail_fast=True)]


def listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bias_by_id(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("Input should be an object of token ids and biases")
    limit, bias_limit = LIMITS["logit_bias"], LIMITS["logit_bias.value"]
    if len(value) > limit.maximum:
        raise ValueError(f"Input should have at most {limit.maximum} entries")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 11):
            raise ValueError("Every key should be a token id in decimal digits")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ValueError(f"The bias of {key} should be a number")
        if not bias_limit.minimum <= bias <= bias_limit.maximum:
            raise ValueError(
                f"The bias of {key} should be between {bias_limit.minimum} and {bias_limit.maximum}"
            )
        biases[int(key)] = float(bias)
    return biases


LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_bias_by_id),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": LIMITS["logit_bias"].maximum,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {
                "type": "number",
                "minimum": LIMITS["logit_bias.value"].minimum,
                "maximum": LIMITS["logit_bias.value"].maximum,
            },
        }
    ),
]
StopString = Annotated[str, Field(**field_arguments("stop.string"))]
StopStringList = Annotated[
    list[StopString],
    BeforeValidator(listed, json_schema_input_type=StopString | list[StopString]),
]


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SamplingFields(StructuredFields):
    """The fields that chat completions and completions share."""

    model: str = limited("model", "The served name, the file's name, or 'default'.", "default")
    stream: bool = Field(False, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(
        None, description="`include_usage`: the last chunk tells the usage."
    )
    return_progress: bool = Field(False, description="With stream: tell how far a long prompt was read.")
    n: int = limited("n", "Choices per prompt; choice i draws with seed + i.", 1)
    max_tokens: int | None = limited("max_tokens", "Most tokens per choice.")
    min_tokens: int = limited("min_tokens", "No choice ends by itself before so many tokens.", 0)
    temperature: float | None = limited("temperature", "0 takes the most likely token.")
    top_p: float | None = limited("top_p", "Smallest set of tokens with this probability.")
    top_k: int | None = limited("top_k", "The k most likely tokens; 0 or -1: all.")
    min_p: float | None = limited("min_p", "Tokens at least so likely, relative to the likeliest.")
    repetition_penalty: float | None = limited("repetition_penalty", "For the prompt's tokens too; 1: none.")
    presence_penalty: float | None = limited("presence_penalty", "For tokens of the answer; 0: none.")
    frequency_penalty: float | None = limited("frequency_penalty", "The same, each time; 0: none.")
    logit_bias: LogitBias = Field(default_factory=dict, description="Added to the logits, by token id.")
    seed: int | None = limited("seed", "Absent: one is drawn. The answer names it.")
    stop: StopStringList = limited("stop", "Texts that end a choice; not part of it.", [])
    stop_token_ids: TokenIdList = limited("stop_token_ids", "Token ids that end a choice.", [])
    ignore_eos: bool = Field(False, description="Do not stop at the model's own end-of-sequence tokens.")

    def check(self) -> None:
        """Refuse what only shows when fields are seen together. Raises APIError 400."""
        for name in ("stream_options", "return_progress"):
            if getattr(self, name) and not self.stream:
                raise errors.invalid_value(name, f"'{name}' is only allowed with 'stream'.")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise errors.invalid_value("min_tokens", "'min_tokens' is greater than 'max_tokens'.")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have. Raises APIError 400."""
        check_token_ids("logit_bias", self.logit_bias, vocab_size)
        check_token_ids("stop_token_ids", self.stop_token_ids, vocab_size)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """With every default filled in: the model's, and a seed that is drawn. `max_tokens` may stay None."""

        def chosen(name: str) -> Any:
            value = getattr(self, name)
            return getattr(defaults, name) if value is None else value

        return SamplingParams(
            n=self.n,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=chosen("temperature"),
            top_k=max(chosen("top_k"), 0),
            top_p=chosen("top_p"),
            min_p=chosen("min_p"),
            repetition_penalty=chosen("repetition_penalty"),
            presence_penalty=chosen("presence_penalty"),
            frequency_penalty=chosen("frequency_penalty"),
            logit_bias=self.logit_bias,
            logprobs=self.num_logprobs,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            seed=secrets.randbelow(MAX_DRAWN_SEED) if self.seed is None else self.seed,
        )


class Worded(Protocol):
    """A part of content that is text."""

    @property
    def text(self) -> str: ...


def joined_text(content: str | Sequence[Worded]) -> str:
    """Content as one text."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _text_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


# Tells a text from a list by its tag, so that an error is of the branch that was meant.
TEXT_OR_LIST = Discriminator(_text_or_list)


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(fail_fast=True, **field_arguments("content")), Tag("<list>")],
    TEXT_OR_LIST,
]


class FunctionCall(Strict):
    name: FunctionName
    arguments: str | dict[str, Any] = Field("", description="JSON; other text is passed on as it is.")
    parsed_arguments: Any = Field(None, description="Not read: what a client made of them.")


class ToolCall(Strict):
    function: FunctionCall
    id: str = limited("tool_call_id", "Results name it.", "")
    type: Literal["function"] = "function"
    index: int | None = Field(None, description="Not read: calls stand in order.")


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = ""
    name: str | None = limited("name", "Given to the chat template.")
    reasoning_content: str | None = Field(None, description="The thoughts of an earlier answer.")
    reasoning: str | None = Field(None, description="The same, by its other name.")
    tool_calls: list[ToolCall] = limited("tool_calls", "Calls of an earlier answer.", [])
    tool_call_id: str | None = limited("tool_call_id", "The call that a tool message answers.")

    @property
    def text(self) -> str:
        return joined_text(self.content)

    def for_template(self) -> dict[str, Any]:
        """With the parts of a text as one text, and without what is not set."""
        fields = ("name", "reasoning_content", "reasoning", "tool_call_id")
        message = {name: value for name in fields if (value := getattr(self, name)) is not None}
        if self.tool_calls:
            message["tool_calls"] = [
                tool_call_fields(call.id, call.function.name, call.function.arguments)
                for call in self.tool_calls
            ]
        return {"role": self.role, "content": self.text, **message}


class FunctionDefinition(Strict):
    name: FunctionName
    description: str | None = limited("tools.description", "Shown to the model.")
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments, an object.")
    strict: bool | None = Field(None, description="true: calls of all tools satisfy their schemas.")


class FunctionTool(Strict):
    type: Literal["function"]
    function: FunctionDefinition

    def definition(self) -> dict[str, Any]:
        """As chat templates show it."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


def _check_template_kwargs(value: Any) -> Any:
    limit = LIMITS["chat_template_kwargs.value"]
    for name, item in value.items() if isinstance(value, dict) else ():
        if not name.isidentifier():
            raise ValueError("Every key should be the name of a variable")
        if not isinstance(item, str | int | float | None):
            raise ValueError(f"{name} should be a string, a number, true, false or null")
        if isinstance(item, str) and len(item) > limit.maximum:
            raise ValueError(f"{name} should have at most {limit.maximum} characters")
    return value


TemplateKwargs = Annotated[dict[str, Any], BeforeValidator(_check_template_kwargs)]


class NamedFunction(Strict):
    name: FunctionName


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


def _choice_tag(value: Any) -> str:
    return "<function>" if isinstance(value, dict) else "<text>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")]
    | Annotated[NamedToolChoice, Tag("<function>")],
    Discriminator(_choice_tag),
]


class ChatRequest(SamplingFields):
    messages: list[Message] = limited("messages", "The conversation.", ...)
    max_completion_tokens: int | None = limited("max_completion_tokens", "Wins over max_tokens.")
    logprobs: bool = Field(False, description="Tell each token's log-probability.")
    top_logprobs: int = limited("top_logprobs", "Alternatives per token; needs logprobs.", 0)
    tools: list[FunctionTool] = limited("tools", "Functions that the model may call.", [])
    tool_choice: ToolChoice | None = Field(None, description="none, auto, required, or a function by name.")
    parallel_tool_calls: bool = Field(True, description="false: the answer ends with its first call.")
    enable_thinking: bool | None = Field(None, description="Whether the model thinks before it answers.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = Field(
        None, description="none: no thinking; minimal, low, medium: at most 256, 1024, 4096 tokens of it."
    )
    thinking_budget: int | None = limited(
        "thinking_budget", "Most tokens to think, before reasoning_effort's."
    )
    chat_template_kwargs: TemplateKwargs = limited(
        "chat_template_kwargs", "Further variables of the chat template.", {}
    )
    add_generation_prompt: bool = Field(True, description="End the prompt where the assistant's turn begins.")
    continue_final_message: bool = Field(False, description="Go on with the last message, the assistant's.")

    def check(self) -> None:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise errors.invalid_value("top_logprobs", "'top_logprobs' is only allowed with 'logprobs'.")
        self._check_tools()
        self._check_continuation()

    def _check_tools(self) -> None:
        names: set[str] = set()
        for index, tool in enumerate(self.tools):
            path, function = f"tools[{index}].function", tool.function
            if function.name in names:
                raise errors.invalid_value(f"{path}.name", f"'{path}.name' is the name of an earlier tool.")
            if (function.parameters or {}).get("type", "object") != "object":
                raise errors.invalid_value(
                    f"{path}.parameters", f"'{path}.parameters' must describe an object."
                )
            names.add(function.name)
        if self.must_call and not names:
            raise errors.invalid_value(
                "tool_choice", "'tool_choice' asks for a call, but there are no 'tools'."
            )
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise errors.invalid_value(
                "tool_choice", "'tool_choice' names a function that is not in 'tools'."
            )

    @property
    def must_call(self) -> bool:
        """Whether the answer is to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedToolChoice)

    @property
    def is_strict(self) -> bool:
        """Whether calls are to be held to their tools' schemas."""
        may_call = self.tool_choice != "none"
        return self.must_call or (may_call and any(tool.function.strict for tool in self.tools))

    def wanted_calls(self, tool_format: str, control_texts: Sequence[str], content: str | None) -> Wanted:
        """What an answer must be that may call; see `jinn.text.grammar.calls.CallsWanted`."""
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedToolChoice) else None
        tools = {
            tool.function.name: tool.function.parameters or {}
            for tool in self.tools
            if named in (None, tool.function.name)
        }
        value = {
            "format": tool_format,
            "tools": tools,
            "is_parallel": self.parallel_tool_calls and named is None,
            "control_texts": list(control_texts),
            "content": content,
        }
        return Wanted(GrammarKind.CALLS, value, "tools")

    def _check_continuation(self) -> None:
        if not self.continue_final_message:
            return
        if "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
            param = "continue_final_message"
            raise errors.invalid_value(param, f"'{param}' contradicts 'add_generation_prompt'.")
        path = f"messages[{len(self.messages) - 1}]"
        if self.messages[-1].role != "assistant" or not self.messages[-1].text:
            raise errors.invalid_value(path, f"'{path}' is not the assistant's, or has nothing to continue.")

    def turn(self) -> TurnRequest:
        """What the conversation asks for."""
        tools = () if self.tool_choice == "none" else tuple(tool.definition() for tool in self.tools)
        return TurnRequest(
            messages=[message.for_template() for message in self.messages],
            tools=tools,
            parallel_tool_calls=self.parallel_tool_calls,
            calls_come_first=self.wanted() is not None,
            template_kwargs={k: v for k, v in self.chat_template_kwargs.items() if v is not None},
            enable_thinking=self.enable_thinking,
            reasoning_effort=self.reasoning_effort,
            thinking_budget=self.thinking_budget,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


def _prompt_list(value: Any) -> Any:
    """The four forms of `prompt` as one: a list of texts or of token id lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and isinstance(value[0], int):
        return [value]
    return value


PromptList = Annotated[
    list[
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[TokenIdList, Tag("<list>")],
            TEXT_OR_LIST,
        ]
    ],
    BeforeValidator(
        _prompt_list, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]]
    ),
]


class CompletionRequest(SamplingFields):
    prompt: PromptList = limited("prompt", "Text or token ids, one or several.", ...)
    max_tokens: int | None = limited("max_tokens", "Most tokens per choice.", 16)
    echo: bool = Field(False, description="Begin each choice with its prompt.")
    suffix: str = limited("suffix", "Text to follow the answer, for models that fill in the middle.", "")
    logprobs: int | None = limited("logprobs", "Alternatives per token; with echo for the prompt's too.")
    best_of: int | None = limited("n", "Only n itself.")
    parse_special: bool = Field(True, description="Text of control tokens in a prompt becomes those tokens.")
    add_special_tokens: bool = Field(True, description="Begin a text prompt as the model expects.")

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != self.n:
            raise errors.unsupported_parameter("best_of", "'best_of' is not supported, unless it equals 'n'.")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise errors.invalid_value("suffix", "'suffix' is only allowed with prompts of text.")
        if self.suffix and self.echo:
            raise errors.invalid_value("suffix", "'suffix' is not allowed together with 'echo'.")
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise errors.invalid_value("prompt", f"'prompt' times 'n' must not exceed {MAX_CHOICES} choices.")

    def check_vocabulary(self, vocab_size: int) -> None:
        super().check_vocabulary(vocab_size)
        for index, prompt in enumerate(self.prompt):
            if not isinstance(prompt, str):
                check_token_ids(f"prompt[{index}]", prompt, vocab_size)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


CHAT_COLUMNS = Columns(frozenset(ChatRequest.model_fields), ACCEPTED, REFUSED_CHAT)
MESSAGE_COLUMNS = Columns(frozenset(Message.model_fields), ACCEPTED_MESSAGE, REFUSED_MESSAGE)
COMPLETION_COLUMNS = Columns(frozenset(CompletionRequest.model_fields), ACCEPTED, REFUSED_COMPLETION)


def parse_chat(body: dict[str, Any], ignored: list[str] | None) -> ChatRequest:
    """Raises APIError 400. Unknown parameters are collected in `ignored`, or refused where it is None."""
    fields = take_implemented(body, CHAT_COLUMNS, "", ignored)
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [
            take_implemented(message, MESSAGE_COLUMNS, f"messages[{index}]", ignored)
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
    request = validate(ChatRequest, fields)
    for index, message in enumerate(request.messages):
        if message.role != "assistant" and "content" not in message.model_fields_set:
            raise missing(f"messages[{index}].content")
    request.check()
    return request


def parse_completion(body: dict[str, Any], ignored: list[str] | None) -> CompletionRequest:
    """Raises APIError 400. Unknown parameters are collected in `ignored`, or refused where it is None."""
    request = validate(CompletionRequest, take_implemented(body, COMPLETION_COLUMNS, "", ignored))
    request.check()
    return request


def validate(model: type[Model], fields: dict[str, Any]) -> Model:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    param = ""
    for key in first["loc"]:
        if not str(key).startswith("<"):  # the tag of a union's branch
            param = join_path(param, key)
    if first["type"] == "missing":
        raise missing(param)
    raise errors.invalid_value(param, f"'{param}': {first['msg'].removeprefix('Value error, ')}.")


def missing(param: str) -> errors.APIError:
    return errors.APIError(
        400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
    )


def check_token_ids(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise errors.invalid_value(
                param, f"'{param}': token id {token_id} is not in the vocabulary of {vocab_size} tokens."
            )
