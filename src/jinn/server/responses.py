"""The shapes of answers, for the OpenAPI document and for tests; the server writes them by hand."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Error(_Closed):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Closed):
    error: Error


class AnthropicError(_Closed):
    type: str
    message: str


class AnthropicErrorResponse(_Closed):
    type: Literal["error"]
    error: AnthropicError


class Status(_Closed):
    status: str


class Model(_Closed):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(_Closed):
    object: Literal["list"]
    data: list[Model]


class PromptTokensDetails(_Closed):
    cached_tokens: int


class CompletionTokensDetails(_Closed):
    reasoning_tokens: int
    accepted_prediction_tokens: int  # drafts of speculative decoding that were right
    rejected_prediction_tokens: int


class Usage(_Closed):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(_Closed):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Closed):
    content: list[TokenLogprob]
    refusal: None


class Function(_Closed):
    name: str
    arguments: str


class ToolCall(_Closed):
    id: str
    type: Literal["function"]
    function: Function


class AnswerMessage(_Closed):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Closed):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class _Answer(_Closed):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    seed: int


class FunctionDelta(_Closed):
    name: str | None = None  # with the first delta of the call only, as are `id` and `type`
    arguments: str


class ToolCallDelta(_Closed):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class MessageDelta(_Closed):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(_Closed):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class PromptProgress(_Closed):
    index: int  # of the prompt
    total: int
    cache: int
    processed: int  # those from the cache included
    time_ms: int


class ChatCompletionChunk(_Answer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    prompt_progress: PromptProgress | None = None
    usage: Usage | None = None
    seed: int | None = None


class CompletionLogprobs(_Closed):
    tokens: list[str]
    token_logprobs: list[float | None]  # None for the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Closed):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(_Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    seed: int


class CompletionChunkChoice(_Closed):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(_Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    prompt_progress: PromptProgress | None = None
    usage: Usage | None = None
    seed: int | None = None


class ReadUsage(_Closed):
    prompt_tokens: int
    total_tokens: int


class Embedding(_Closed):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(_Closed):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: ReadUsage


class RerankedDocument(_Closed):
    text: str


class RerankResult(_Closed):
    index: int
    relevance_score: float
    document: RerankedDocument | None = None


class Reranking(_Closed):
    id: str
    model: str
    results: list[RerankResult]
    usage: ReadUsage


class ScoredPair(_Closed):
    index: int
    object: Literal["score"]
    score: float


class ScoreList(_Closed):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoredPair]
    usage: ReadUsage


class Tokens(_Closed):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(_Closed):
    prompt: str


class TokenizerInfo(_Closed):
    bos_token: str | None
    eos_token: str | None
