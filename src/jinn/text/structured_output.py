"""What the answers of `jinn.LLM` must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """What an answer must be, in one of the ways that the server knows: see docs/structured-output.md.

    Attributes:
        json_schema: a JSON schema that it satisfies.
        json_object: True: any JSON object.
        regex: a pattern (ECMA-262) that all of it matches.
        choice: texts, of which it is one.
        grammar: a grammar in GBNF, or in llguidance's Lark.

    Raises ValueError unless one of them is given.
    """

    json_schema: Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if len(self._given()) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise ValueError(f"a StructuredOutput takes one of {names}")
        if isinstance(self.choice, str):
            raise ValueError("choice must be a list of texts, not one")

    def grammar_text(self) -> str:
        """What llguidance reads. Raises ValueError naming the attribute and, in a schema, the place."""
        from jinn.text.grammar.grammars import GrammarError, GrammarKind
        from jinn.text.grammar.worker import compiled

        ((name, value),) = self._given().items()
        values = {"json_object": None, "choice": None if self.choice is None else list(self.choice)}
        try:
            return compiled(GrammarKind(name), values.get(name, value))
        except GrammarError as error:
            place = f" (at '{error.pointer}')" if error.pointer else ""
            raise ValueError(f"{name}: {error}{place}") from None
        except RecursionError:
            raise ValueError(f"{name}: it is nested too deeply") from None

    def _given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value is not False}
