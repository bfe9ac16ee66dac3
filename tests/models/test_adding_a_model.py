"""docs/adding-a-model.md shows code as it is."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from jinn.models import qwen3, registry
from jinn.models.fields import ConfigError, Fields

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-model.md").read_text(encoding="utf-8")


def test_the_page_has_the_whole_family():
    source = inspect.getsource(qwen3)
    assert f"```python\n{source[source.index('@dataclass') :]}```" in PAGE


def test_the_page_has_the_line_of_the_registry():
    assert '`"qwen3": "qwen3.Qwen3"`' in PAGE
    assert '"qwen3": "qwen3.Qwen3",' in inspect.getsource(registry)


@pytest.mark.parametrize("architecture", registry.FAMILIES)
def test_each_line_of_the_registry_names_a_family(architecture):
    with pytest.raises(ConfigError, match=r"config field .* is missing"):
        registry.family_of(architecture)(Fields({}))
