"""litellm, as a client: `python litellm_client.py URL`."""

from __future__ import annotations

import json

import litellm
from task import BASE_URL, QUESTION, TOOL, City, get_weather

body = {
    "model": "openai/default",
    "api_base": BASE_URL,
    "api_key": "none",
    "temperature": 0,
    "max_tokens": 160,
}
question = [{"role": "user", "content": QUESTION}]
answer = litellm.completion(**body, messages=question)
assert "Paris" in answer.choices[0].message.content, answer
chunks = list(
    litellm.completion(**body, messages=question, stream=True, stream_options={"include_usage": True})
)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == answer.choices[0].message.content
whole = litellm.stream_chunk_builder(chunks)
assert whole.usage.completion_tokens == answer.usage.completion_tokens, whole.usage

messages = [{"role": "user", "content": "What is the weather in Paris?"}]
asked = {**body, "tools": [TOOL], "parallel_tool_calls": False}
chunks = list(litellm.completion(**asked, messages=messages, tool_choice="required", stream=True))
message = litellm.stream_chunk_builder(chunks).choices[0].message
(call,) = message.tool_calls
result = get_weather(**json.loads(call.function.arguments))
messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
assert litellm.completion(**body, messages=messages).choices[0].message.content

structured = litellm.completion(**body, messages=question, response_format=City)
City.model_validate_json(structured.choices[0].message.content)
