"""jinn serves, trains, meters and prices language models on hardware you own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinn.engine.messages import SamplingParams
    from jinn.llm import LLM

    __version__: str

__all__ = ["LLM", "SamplingParams", "__version__"]

_MODULES = {"LLM": "jinn.llm", "SamplingParams": "jinn.engine.messages"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used, so that `import jinn` costs nothing."""
        if name == "__version__":
            value = importlib.import_module("importlib.metadata").version("jinn")
        elif name in _MODULES:
            value = getattr(importlib.import_module(_MODULES[name]), name)
        else:
            raise AttributeError(f"module 'jinn' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
