"""instructor: `python instructor_client.py URL`."""

from __future__ import annotations

import instructor
import openai
from task import BASE_URL, QUESTION, City

body = {
    "model": "default",
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 160,
    "response_model": City,
    "max_retries": 0,
}
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(
        openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0), mode=mode
    )
    city = client.create(**body)
    assert isinstance(city, City), mode
    *_, last = client.create_partial(**body)
    assert last.model_dump() == city.model_dump(), mode
