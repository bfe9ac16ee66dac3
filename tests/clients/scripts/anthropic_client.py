"""Anthropic's own package, and its count of tokens: `python anthropic_client.py URL`."""

from __future__ import annotations

import anthropic
from task import CITY_SCHEMA, PARAMETERS, QUESTION, ROOT, City, get_weather

client = anthropic.Anthropic(base_url=ROOT, api_key="none", max_retries=0)
question = [{"role": "user", "content": QUESTION}]
body = {"model": "default", "max_tokens": 160, "extra_body": {"temperature": 0}}
answer = client.messages.create(**body, messages=question)
assert "Paris" in answer.content[0].text, answer
with client.messages.stream(**body, messages=question) as stream:
    assert "".join(stream.text_stream) == answer.content[0].text
counted = client.messages.count_tokens(model="default", messages=question)
usage = answer.usage
assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens, usage

tool = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": PARAMETERS,
    "strict": True,
}
choice = {"type": "any", "disable_parallel_tool_use": True}
asked = [{"role": "user", "content": "What is the weather in Paris?"}]
with client.messages.stream(**body, messages=asked, tools=[tool], tool_choice=choice) as stream:
    message = stream.get_final_message()
assert message.stop_reason == "tool_use", message
(call,) = [block for block in message.content if block.type == "tool_use"]
result = {"type": "tool_result", "tool_use_id": call.id, "content": get_weather(**call.input)}
after = client.messages.create(
    **body,
    messages=[
        *asked,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ],
)
assert after.content[0].text, after

output_config = {"format": {"type": "json_schema", "schema": CITY_SCHEMA}}
structured = client.messages.create(**body, messages=question, output_config=output_config)
City.model_validate_json(structured.content[0].text)
