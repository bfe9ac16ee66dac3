"""A chat, a stream and a count with Anthropic's package: `python anthropic_client.py URL`."""

from __future__ import annotations

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
question = [{"role": "user", "content": "What is the capital of France?"}]
body = {"model": "default", "max_tokens": 24, "messages": question, "extra_body": {"temperature": 0}}
answer = client.messages.create(**body)
assert "Paris" in answer.content[0].text, answer
with client.messages.stream(**body) as stream:
    assert "".join(stream.text_stream) == answer.content[0].text
counted = client.messages.count_tokens(model="default", messages=question)
usage = answer.usage
assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens, usage
