"""qwen-agent, with the server's own tool calls: `python qwen_agent_client.py URL`."""

from __future__ import annotations

from qwen_agent.agents import Assistant
from qwen_agent.llm import get_chat_model
from qwen_agent.tools.base import BaseTool, register_tool
from task import ASK_TO_CALL, BASE_URL, CITY_SCHEMA, QUESTION, City, get_weather


@register_tool("get_weather")
class GetWeather(BaseTool):
    description = "The weather of a city."
    parameters = {  # noqa: RUF012  as qwen-agent's own tools have them
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    }

    def call(self, params: str | dict, **_: object) -> str:
        return get_weather(**self._verify_json_format_args(params))


config = {"model": "default", "model_type": "oai", "model_server": BASE_URL, "api_key": "none"}
generate = {"temperature": 0, "max_tokens": 160}
chat = get_chat_model({**config, "generate_cfg": generate})
question = [{"role": "user", "content": QUESTION}]
(whole,) = chat.chat(question, stream=False)
assert "Paris" in whole["content"], whole
*_, (last,) = chat.chat(question, stream=True)
assert last["content"] == whole["content"]

raw = {**config, "generate_cfg": {**generate, "use_raw_api": True}}
agent = Assistant(llm=raw, function_list=["get_weather"])
for said in agent.run([{"role": "user", "content": ASK_TO_CALL}]):
    results = [message for message in said if message["role"] == "function"]
    if results:
        break
assert results[0]["content"] == get_weather("Paris"), said

named = {"name": "city", "schema": CITY_SCHEMA, "strict": True}
response_format = {"type": "json_schema", "json_schema": named}
(structured,) = chat.chat(question, stream=False, extra_generate_cfg={"response_format": response_format})
City.model_validate_json(structured["content"])
