"""jinn serves, trains, meters and prices language models on hardware you own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinn.engine.messages import SamplingParams
    from jinn.llm import LLM
    from jinn.text.structured_output import StructuredOutput

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "StructuredOutput", "__version__"]

_MODULES = {
    "LLM": "jinn.llm",
    "SamplingParams": "jinn.engine.messages",
    "StructuredOutput": "jinn.text.structured_output",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used, so that `import jinn` costs nothing."""
        if name not in _MODULES:
            raise AttributeError(f"module 'jinn' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
