"""The fields that say what an answer must be: OpenAI's, vLLM's and llama.cpp's, all for the same thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jinn.server import errors
from jinn.server.limits import field_arguments
from jinn.text.grammar.grammars import GrammarKind

Schema = dict[str, Any]
Choices = Annotated[list[str], Field(fail_fast=True, **field_arguments("guided_choice"))]
Pattern = Annotated[str, Field(**field_arguments("guided_regex"))]
GrammarText = Annotated[str, Field(**field_arguments("guided_grammar"))]
SchemaName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an answer must be, and the path of the field that says so."""

    kind: GrammarKind
    value: Any
    param: str


class Strict(BaseModel):
    """Built when it is first used: a server is ready sooner, and builds no form that nobody asks for."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True, defer_build=True)


class NamedSchema(Strict):
    name: SchemaName = Field(description="For the client's own use.")
    schema_: Schema = Field(alias="schema", description="JSON schema of the answer.")
    strict: bool | None = Field(None, description="Changes nothing: every schema is followed strictly.")
    description: str | None = Field(None, description="For the client's own use.")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = Field(None, description="With `json_schema`.")
    schema_: Schema | None = Field(None, alias="schema", description="With `json_object`, as in llama.cpp.")


class StructuredOutputs(Strict):
    json_: Schema | None = Field(None, alias="json", description="JSON schema of the answer.")
    json_object: bool | None = Field(None, description="true: any JSON object.")
    regex: Pattern | None = Field(None, description="A pattern (ECMA-262) that the whole answer matches.")
    choice: Choices | None = Field(None, description="The answer is one of these.")
    grammar: GrammarText | None = Field(None, description="A grammar in GBNF, or llguidance's Lark.")


class StructuredFields(Strict):
    """What an answer must be; one field at most."""

    response_format: ResponseFormat | None = Field(None, description="Hold the answer to JSON.")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's: one of its fields.")
    guided_json: Schema | None = Field(None, description="As structured_outputs.json.")
    guided_regex: Pattern | None = Field(None, description="As structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="As structured_outputs.choice.")
    guided_grammar: GrammarText | None = Field(None, description="As structured_outputs.grammar.")
    json_schema: Schema | None = Field(None, description="As structured_outputs.json.")
    grammar: Annotated[str, Field(**field_arguments("grammar"))] | None = Field(
        None, description="As structured_outputs.grammar; empty: none."
    )

    def wanted(self) -> Wanted | None:
        """What the answer must be, if anything. Raises APIError 400 where more than one field says so."""
        found = [*_of_response_format(self.response_format), *_of_structured_outputs(self.structured_outputs)]
        for name, kind in _KINDS.items():
            if (value := getattr(self, name)) is not None and value != "":
                found.append(Wanted(kind, value, name))
        if len(found) > 1:
            raise errors.invalid_value(
                found[1].param, f"'{found[1].param}' is not allowed together with '{found[0].param}'."
            )
        return found[0] if found else None


_KINDS = {
    "guided_json": GrammarKind.JSON_SCHEMA,
    "guided_regex": GrammarKind.REGEX,
    "guided_choice": GrammarKind.CHOICE,
    "guided_grammar": GrammarKind.GRAMMAR,
    "json_schema": GrammarKind.JSON_SCHEMA,
    "grammar": GrammarKind.GRAMMAR,
}


def _of_response_format(wanted: ResponseFormat | None) -> list[Wanted]:
    if wanted is None:
        return []
    if (wanted.json_schema is not None) != (wanted.type == "json_schema"):
        raise errors.invalid_value(
            "response_format.json_schema", "'response_format.json_schema' goes with the type 'json_schema'."
        )
    if wanted.schema_ is not None and wanted.type != "json_object":
        raise errors.invalid_value(
            "response_format.schema", "'response_format.schema' goes with the type 'json_object'."
        )
    if wanted.json_schema is not None:
        param = "response_format.json_schema.schema"
        return [Wanted(GrammarKind.JSON_SCHEMA, wanted.json_schema.schema_, param)]
    if wanted.schema_ is not None:
        return [Wanted(GrammarKind.JSON_SCHEMA, wanted.schema_, "response_format.schema")]
    return [Wanted(GrammarKind.JSON_OBJECT, None, "response_format")] if wanted.type == "json_object" else []


def _of_structured_outputs(wanted: StructuredOutputs | None) -> list[Wanted]:
    if wanted is None:
        return []
    values = {
        GrammarKind.JSON_SCHEMA: ("json", wanted.json_),
        GrammarKind.JSON_OBJECT: ("json_object", wanted.json_object or None),
        GrammarKind.REGEX: ("regex", wanted.regex),
        GrammarKind.CHOICE: ("choice", wanted.choice),
        GrammarKind.GRAMMAR: ("grammar", wanted.grammar),
    }
    return [
        Wanted(kind, value, f"structured_outputs.{name}")
        for kind, (name, value) in values.items()
        if value is not None
    ]
