"""What every client is asked to do: a chat, a stream, a tool round trip and a structured answer."""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import BaseModel, ConfigDict

ROOT = sys.argv[1]
BASE_URL = f"{ROOT}/v1"
QUESTION = "What is the capital of France?"

# A small model calls only where it must, or where it has a call to copy.
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ASK_TO_CALL = f"Copy this:\n{CALL}"


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    assert city == "Paris"
    return "sunny, 21 degrees"


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["Paris", "Rome"]
    is_large: bool


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": PARAMETERS},
}
CITY_SCHEMA = City.model_json_schema()
