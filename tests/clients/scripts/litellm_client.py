"""A chat and a stream through litellm: `python litellm_client.py URL`."""

from __future__ import annotations

import sys

import litellm

body = {
    "model": "openai/default",
    "api_base": f"{sys.argv[1]}/v1",
    "api_key": "none",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 24,
}
answer = litellm.completion(**body)
assert "Paris" in answer.choices[0].message.content, answer
chunks = list(litellm.completion(**body, stream=True, stream_options={"include_usage": True}))
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == answer.choices[0].message.content
whole = litellm.stream_chunk_builder(chunks)
assert whole.usage.completion_tokens == answer.usage.completion_tokens, whole.usage
