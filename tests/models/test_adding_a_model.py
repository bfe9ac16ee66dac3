"""docs/adding-a-model.md shows code as it is."""

from __future__ import annotations

import inspect
from pathlib import Path

from jinn.models import qwen3, registry

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-model.md").read_text(encoding="utf-8")


def test_the_page_has_the_whole_family():
    source = inspect.getsource(qwen3)
    assert f"```python\n{source[source.index('@dataclass') :]}```" in PAGE


def test_the_page_has_the_line_of_the_registry():
    assert '`"qwen3": Qwen3.from_config`' in PAGE
    assert '"qwen3": Qwen3.from_config,' in inspect.getsource(registry)
