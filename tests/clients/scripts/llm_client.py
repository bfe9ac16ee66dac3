"""simonw's llm: `python llm_client.py URL`."""

from __future__ import annotations

from llm.default_plugins.openai_models import Chat
from task import ASK_TO_CALL, BASE_URL, QUESTION, City, get_weather

model = Chat("default", model_name="default", api_base=BASE_URL, supports_tools=True, supports_schema=True)
options = {"key": "none", "temperature": 0, "max_tokens": 160}
whole = model.prompt(QUESTION, stream=False, **options).text()
assert "Paris" in whole, whole
assert "".join(model.prompt(QUESTION, **options)) == whole

chain = model.chain(
    ASK_TO_CALL, tools=[get_weather], key="none", options={"temperature": 0, "max_tokens": 160}
)
responses = chain.responses()
assert [call.arguments for call in next(responses).tool_calls()] == [{"city": "Paris"}]
assert next(responses).prompt.tool_results[0].output == get_weather("Paris")

City.model_validate_json(model.prompt(QUESTION, schema=City, **options).text())
