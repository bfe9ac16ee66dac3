"""pydantic-ai: `python pydantic_ai_client.py URL`."""

from __future__ import annotations

import asyncio

from pydantic_ai import Agent, NativeOutput, ToolOutput, UsageLimits
from pydantic_ai.messages import ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from task import ASK_TO_CALL, BASE_URL, QUESTION, City, get_weather

model = OpenAIChatModel("default", provider=OpenAIProvider(base_url=BASE_URL, api_key="none"))
settings = {"temperature": 0, "max_tokens": 160, "parallel_tool_calls": False}
limits = UsageLimits(request_limit=3)


async def main() -> None:
    plain = Agent(model, model_settings=settings)
    whole = (await plain.run(QUESTION)).output
    assert "Paris" in whole, whole
    async with plain.run_stream(QUESTION) as streamed:
        assert await streamed.get_output() == whole

    caller = Agent(model, model_settings=settings, tools=[get_weather])
    async with caller.iter(ASK_TO_CALL, usage_limits=limits) as run:
        async for node in run:
            parts = getattr(getattr(node, "request", None), "parts", ())
            if results := [part.content for part in parts if isinstance(part, ToolReturnPart)]:
                break
    assert results == [get_weather("Paris")], results

    for output in (NativeOutput(City), ToolOutput(City)):
        answer = await Agent(model, model_settings=settings, output_type=output).run(QUESTION)
        assert isinstance(answer.output, City)


asyncio.run(main())
