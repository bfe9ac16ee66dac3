"""A chat with simonw's llm: `python llm_client.py URL`."""

from __future__ import annotations

import sys

from llm.default_plugins.openai_models import Chat

model = Chat("default", model_name="default", api_base=f"{sys.argv[1]}/v1")
response = model.prompt("What is the capital of France?", key="none", temperature=0, max_tokens=24)
assert "Paris" in response.text(), response.text()
