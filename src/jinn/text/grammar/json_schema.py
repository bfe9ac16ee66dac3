"""JSON schemas of a request: checked, and written again in what llguidance follows to the letter.

A keyword that it would ignore, or follow only nearly, is refused by name and place; so a finished answer
always satisfies its schema. What comes out has no annotations, holds each `$ref`'s target under `$defs`, and
may be narrower than what came in (bounds lie within 2**53), but never wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jinn.text.grammar.bounds import (
    NUM_DIGITS,
    SAFE_INTEGER,
    greatest,
    greatest_multiple,
    is_exact,
    least,
    num_decimals,
    scaled,
)
from jinn.text.grammar.formats import FORMATS, NUMBER_FORMATS
from jinn.text.grammar.pattern import PatternError, anywhere

MAX_DEPTH = 32  # subschemas within subschemas
MAX_SUBSCHEMAS = 5_000
MAX_ENUM_VALUES = 5_000  # of all enums together, and what is inside their values
MAX_CHARACTERS = 250_000  # of all names, constants and patterns together
MAX_ITEMS = 4_096  # that minItems, maxItems, minProperties or maxProperties may count
MAX_CHAIN = 64  # references that lead to a value only one by one
MAX_STRING_LENGTH = 100_000  # that minLength or maxLength may count

_DRAFTS = {
    "https://json-schema.org/draft/2020-12/schema": 2020,
    "https://json-schema.org/draft/2019-09/schema": 2019,
    "http://json-schema.org/draft-07/schema": 7,
    "http://json-schema.org/draft-06/schema": 6,
}
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_ANNOTATIONS = frozenset(
    {"$anchor", "$comment", "$defs", "definitions", "title", "description", "default", "example", "examples"}
    | {"deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator"}
)
_MAX_MULTIPLE, _MAX_DECIMALS = 2**31, 6
_MAX_DIVISOR, _MAX_DIVISOR_PRODUCT = 5_000, 20_000  # beyond, llguidance follows remainders for too long
_COMBINING = frozenset({"allOf", "anyOf", "oneOf", "$ref"})  # what they hold may be said of one value twice


class SchemaError(ValueError):
    """What in a schema is wrong or not supported, and where: `pointer` is a JSON pointer (RFC 6901)."""

    def __init__(self, pointer: str, message: str) -> None:
        super().__init__(f"{message} (at '{pointer}')" if pointer else message)
        self.message = message
        self.pointer = pointer


def normalized(schema: Any) -> dict[str, Any]:
    """The schema in the keywords and forms that are followed exactly. Raises SchemaError."""
    if not isinstance(schema, dict):
        raise SchemaError("", "the schema must be an object")
    return _Normalizer(schema).run()


def escape_pointer(key: str | int) -> str:
    """One step of a JSON pointer."""
    return str(key).replace("~", "~0").replace("/", "~1")


@dataclass(slots=True)
class _Normalizer:
    """One schema on its way. `definitions` are the targets of references, by pointer."""

    root: dict[str, Any]
    draft: int = 2020
    names: dict[str, str] = field(default_factory=dict)  # pointer to its name in `definitions`
    definitions: dict[str, Any] = field(default_factory=dict)
    multiples: dict[float, str] = field(default_factory=dict)
    is_combined: bool = False  # so that two multiples may be asked of one value
    num_subschemas: int = 0
    num_enum_values: int = 0
    num_characters: int = 0

    def run(self) -> dict[str, Any]:
        root = dict(self.root)
        draft = root.pop("$schema", "https://json-schema.org/draft/2020-12/schema")
        if not isinstance(draft, str) or draft.rstrip("#") not in _DRAFTS:
            raise SchemaError("/$schema", f"'$schema' must be one of {', '.join(_DRAFTS)}")
        self.draft = _DRAFTS[draft.rstrip("#")]
        root.pop("$id", None)  # references begin with '#', so the root's own name changes none
        result = self.subschema(root, "", 0)
        if not isinstance(result, dict):
            raise TypeError("a schema that is an object stays one")
        pending = list(self.names)
        done: set[str] = set()
        while pending:
            for pointer in pending:
                done.add(pointer)
                target = root if pointer == "" else _resolve(self.root, pointer)
                self.definitions[self.names[pointer]] = self.subschema(target, pointer, 0)
            pending = [pointer for pointer in self.names if pointer not in done]
        self.check_multiples()
        self.check_ends(result)
        return {**result, "$defs": self.definitions} if self.definitions else result

    def check_ends(self, result: dict[str, Any]) -> None:
        """Refuse references that only lead to more of the same, so that no answer could ever end."""
        finite: set[str] = set()
        for _ in range(MAX_CHAIN):
            more = {
                name for name, s in self.definitions.items() if name not in finite and _can_end(s, finite)
            }
            if not more:
                break
            finite |= more
        pointers = {"": result} | {p: self.definitions[name] for p, name in self.names.items()}
        for pointer, subschema in pointers.items():
            if not _can_end(subschema, finite):
                raise SchemaError(
                    pointer, "every value of this schema would have to contain another, without end"
                )

    def subschema(self, schema: Any, pointer: str, depth: int) -> dict[str, Any] | bool:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(pointer, "a schema must be an object, true or false")
        self.num_subschemas += 1
        if self.num_subschemas > MAX_SUBSCHEMAS:
            raise SchemaError(pointer, f"the schema has more than {MAX_SUBSCHEMAS} subschemas")
        if depth > MAX_DEPTH:
            raise SchemaError(pointer, f"the schema is nested deeper than {MAX_DEPTH} levels")
        result: dict[str, Any] = {}
        for keyword, value in schema.items():
            self.keyword(keyword, value, f"{pointer}/{escape_pointer(keyword)}", depth, schema, result)
        _set_bounds(result, pointer)
        _check_min_properties(result, pointer)
        # llguidance reads keywords in order; those beside an applicator must be seen together.
        return dict(sorted(result.items(), key=lambda item: item[0] in _APPLICATORS))

    def keyword(
        self,
        keyword: str,
        value: Any,
        pointer: str,
        depth: int,
        schema: dict[str, Any],
        result: dict[str, Any],
    ) -> None:
        """Add what a keyword asks for to `result`."""
        if keyword in _ANNOTATIONS or (keyword.startswith("x-") and keyword != "x-guidance"):
            return
        read = _KEYWORDS.get(keyword)
        if read is None:
            raise SchemaError(pointer, f"the keyword '{keyword}' is not supported")
        self.is_combined |= keyword in _COMBINING
        read(self, value, pointer, depth, schema, result)

    def types(self, value: Any, pointer: str, _: int, __: Any, result: dict[str, Any]) -> None:
        types = value if isinstance(value, list) else [value]
        if not types or not all(isinstance(t, str) and t in _TYPES for t in types):
            raise SchemaError(pointer, f"'type' must be one or several of {', '.join(_TYPES)}")
        result["type"] = value

    def number(self, value: Any, pointer: str, _: int, __: Any, result: dict[str, Any]) -> None:
        result[pointer.rpartition("/")[2]] = _number(value, pointer)

    def multiple_of(self, value: Any, pointer: str, _: int, __: Any, result: dict[str, Any]) -> None:
        number = _number(value, pointer)
        if number <= 0:
            raise SchemaError(pointer, "'multipleOf' must be greater than 0")
        self.multiples[number] = pointer
        result["multipleOf"] = number

    def check_multiples(self) -> None:
        """llguidance multiplies those that meet, in 32 bits, and follows the remainders of the product."""
        decimals = min(max(map(num_decimals, self.multiples), default=0), _MAX_DECIMALS)
        product = 1
        for number, pointer in self.multiples.items():
            product *= scaled(number, decimals)
            is_costly = scaled(number, num_decimals(number)) > _MAX_DIVISOR or (
                self.is_combined and product > _MAX_DIVISOR_PRODUCT
            )
            if num_decimals(number) > decimals or product >= _MAX_MULTIPLE or is_costly:
                raise SchemaError(pointer, "the values of 'multipleOf' have too many digits")

    def count(self, value: Any, pointer: str, _: int, __: Any, result: dict[str, Any]) -> None:
        keyword = pointer.rpartition("/")[2]
        maximum = MAX_STRING_LENGTH if keyword.endswith("Length") else MAX_ITEMS
        if _number(value, pointer) != math.floor(value):
            raise SchemaError(pointer, f"'{keyword}' must be an integer")
        if not 0 <= value <= maximum:
            raise SchemaError(pointer, f"'{keyword}' must be between 0 and {maximum}")
        result[keyword] = int(value)

    def pattern(self, value: Any, pointer: str, _: int, __: Any, result: dict[str, Any]) -> None:
        result["pattern"] = self.anywhere(value, pointer)

    def anywhere(self, pattern: Any, pointer: str) -> str:
        if not isinstance(pattern, str):
            raise SchemaError(pointer, "a pattern must be a string")
        self.add_characters(pattern, pointer)
        try:
            return anywhere(pattern)
        except PatternError as error:
            raise SchemaError(pointer, f"the pattern is not supported: {error}") from None

    def format(self, value: Any, pointer: str, _: int, schema: Any, result: dict[str, Any]) -> None:
        types = schema.get("type", _TYPES)
        types = types if isinstance(types, list | tuple) else [types]
        if value in NUMBER_FORMATS and not {"string"} & set(types):
            if (bound := NUMBER_FORMATS[value]) is not None:
                result.setdefault("allOf", []).append({"minimum": -bound, "maximum": bound})
            return
        if not isinstance(value, str) or value not in FORMATS:
            raise SchemaError(
                pointer, f"the format {value!r} is not supported; supported: {', '.join(FORMATS)}"
            )
        own = FORMATS[value]
        if own is None:
            result["format"] = value
        else:
            result.setdefault("allOf", []).append({"pattern": anywhere(own)})

    def enum(self, value: Any, pointer: str, _: int, __: Any, result: dict[str, Any]) -> None:
        if not isinstance(value, list) or not value:
            raise SchemaError(pointer, "'enum' must be a list of at least one value")
        for index, item in enumerate(value):
            self.constant(item, f"{pointer}/{index}", 0)
        result["enum"] = value

    def const(self, value: Any, pointer: str, _: int, __: Any, result: dict[str, Any]) -> None:
        self.constant(value, pointer, 0)
        result["const"] = value

    def constant(self, value: Any, pointer: str, depth: int) -> None:
        """Refuse values that cannot be written or compared exactly."""
        self.num_enum_values += 1
        if self.num_enum_values > MAX_ENUM_VALUES:
            raise SchemaError(pointer, f"the schema has more than {MAX_ENUM_VALUES} constant values")
        if depth > MAX_DEPTH:
            raise SchemaError(pointer, f"the value is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, str):
            self.add_characters(value, pointer)
            if any((char < " " and char not in "\b\t\n\f\r") or char == "\x7f" for char in value):
                raise SchemaError(pointer, "control characters are not supported in constant values")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if not is_exact(_number(value, pointer)):
                raise SchemaError(
                    pointer,
                    f"constant numbers beyond 2**53 or of more than {NUM_DIGITS} digits are not supported",
                )
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self.constant(item, f"{pointer}/{index}", depth + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                self.constant(key, pointer, depth + 1)
                self.constant(item, f"{pointer}/{escape_pointer(key)}", depth + 1)

    def add_characters(self, text: str, pointer: str) -> None:
        self.num_characters += len(text)
        if self.num_characters > MAX_CHARACTERS:
            raise SchemaError(
                pointer, f"names, constants and patterns have more than {MAX_CHARACTERS} characters"
            )

    def one(self, value: Any, pointer: str, depth: int, __: Any, result: dict[str, Any]) -> None:
        result[pointer.rpartition("/")[2]] = self.subschema(value, pointer, depth + 1)

    def items(self, value: Any, pointer: str, depth: int, schema: Any, result: dict[str, Any]) -> None:
        if not isinstance(value, list):
            result["items"] = self.subschema(value, pointer, depth + 1)
        elif self.draft == 2020:
            raise SchemaError(pointer, "a list of schemas is called 'prefixItems' in this draft")
        else:
            result["prefixItems"] = self.subschemas(value, pointer, depth)

    def additional_items(
        self, value: Any, pointer: str, depth: int, schema: Any, result: dict[str, Any]
    ) -> None:
        if self.draft == 2020:
            raise SchemaError(pointer, "the keyword 'additionalItems' is not in this draft")
        if isinstance(schema.get("items"), list):
            result["items"] = self.subschema(value, pointer, depth + 1)

    def prefix_items(self, value: Any, pointer: str, depth: int, _: Any, result: dict[str, Any]) -> None:
        if self.draft != 2020:
            raise SchemaError(pointer, "the keyword 'prefixItems' is not in this draft")
        result["prefixItems"] = self.subschemas(value, pointer, depth)

    def several(self, value: Any, pointer: str, depth: int, _: Any, result: dict[str, Any]) -> None:
        keyword = pointer.rpartition("/")[2]
        result[keyword] = [*result.get(keyword, []), *self.subschemas(value, pointer, depth)]

    def one_of(self, value: Any, pointer: str, depth: int, _: Any, result: dict[str, Any]) -> None:
        """With the targets of references in their places: options must be seen to exclude each other."""
        options = []
        for index, option in enumerate(_list(value, pointer)):
            where = f"{pointer}/{index}"
            for _step in range(MAX_DEPTH):
                if (
                    not isinstance(option, dict)
                    or "$ref" not in option
                    or set(option) - {"$ref"} - _ANNOTATIONS
                ):
                    break
                where = self.target(option["$ref"], f"{where}/$ref")
                option = _resolve(self.root, where)
            options.append(self.subschema(option, where, depth + 1))
        result["oneOf"] = options

    def subschemas(self, value: Any, pointer: str, depth: int) -> list[Any]:
        return [
            self.subschema(item, f"{pointer}/{index}", depth + 1)
            for index, item in enumerate(_list(value, pointer))
        ]

    def properties(self, value: Any, pointer: str, depth: int, _: Any, result: dict[str, Any]) -> None:
        result["properties"] = self.mapping(value, pointer, depth)

    def pattern_properties(
        self, value: Any, pointer: str, depth: int, _: Any, result: dict[str, Any]
    ) -> None:
        mapping = self.mapping(value, pointer, depth)
        patterns: dict[str, Any] = {}
        for key, item in mapping.items():
            where = f"{pointer}/{escape_pointer(key)}"
            if (pattern := self.anywhere(key, where)) in patterns:
                raise SchemaError(where, "this pattern is the same as another")
            patterns[pattern] = item
        result["patternProperties"] = patterns

    def mapping(self, value: Any, pointer: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise SchemaError(pointer, "this must be an object of schemas")
        for name in value:
            self.add_characters(name, pointer)
        return {
            name: self.subschema(item, f"{pointer}/{escape_pointer(name)}", depth + 1)
            for name, item in value.items()
        }

    def required(self, value: Any, pointer: str, _: int, __: Any, result: dict[str, Any]) -> None:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise SchemaError(pointer, "'required' must be a list of names")
        for name in value:
            self.add_characters(name, pointer)
        result["required"] = value

    def ref(self, value: Any, pointer: str, _: int, __: Any, result: dict[str, Any]) -> None:
        target = self.target(value, pointer)
        name = self.names.setdefault(target, str(len(self.names)))
        result["$ref"] = f"#/$defs/{name}"

    def target(self, value: Any, pointer: str) -> str:
        """The pointer that a reference holds."""
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")) or "%" in value:
            raise SchemaError(pointer, "a reference must begin with '#/' and hold no '%'")
        target = value[1:]
        if _resolve(self.root, target) is None:
            raise SchemaError(pointer, f"the reference {value!r} leads nowhere")
        return target

    def unique_items(self, value: Any, pointer: str, *_: Any) -> None:
        if value is not False:
            raise SchemaError(pointer, "the keyword 'uniqueItems' is not supported")

    def misplaced(self, _: Any, pointer: str, *__: Any) -> None:
        raise SchemaError(pointer, f"'{pointer.rpartition('/')[2]}' is supported at the root only")


_APPLICATORS = frozenset({"enum", "const", "allOf", "anyOf", "oneOf", "$ref"})
_Read = Callable[[_Normalizer, Any, str, int, dict[str, Any], dict[str, Any]], None]
_KEYWORDS: dict[str, _Read] = {
    "type": _Normalizer.types,
    "enum": _Normalizer.enum,
    "const": _Normalizer.const,
    "allOf": _Normalizer.several,
    "anyOf": _Normalizer.several,
    "oneOf": _Normalizer.one_of,
    "$ref": _Normalizer.ref,
    "items": _Normalizer.items,
    "additionalItems": _Normalizer.additional_items,
    "prefixItems": _Normalizer.prefix_items,
    "minItems": _Normalizer.count,
    "maxItems": _Normalizer.count,
    "uniqueItems": _Normalizer.unique_items,
    "properties": _Normalizer.properties,
    "patternProperties": _Normalizer.pattern_properties,
    "additionalProperties": _Normalizer.one,
    "required": _Normalizer.required,
    "minProperties": _Normalizer.count,
    "maxProperties": _Normalizer.count,
    "minLength": _Normalizer.count,
    "maxLength": _Normalizer.count,
    "pattern": _Normalizer.pattern,
    "format": _Normalizer.format,
    "minimum": _Normalizer.number,
    "maximum": _Normalizer.number,
    "exclusiveMinimum": _Normalizer.number,
    "exclusiveMaximum": _Normalizer.number,
    "multipleOf": _Normalizer.multiple_of,
    "$schema": _Normalizer.misplaced,
    "$id": _Normalizer.misplaced,
}


def _can_end(schema: Any, finite: set[str]) -> bool:
    """Whether some value may satisfy a schema without needing a reference other than `finite` ones.

    True also where that is not clear.
    """
    if isinstance(schema, bool):
        return True
    if "$ref" in schema and schema["$ref"].removeprefix("#/$defs/") not in finite:
        return False
    if not all(_can_end(part, finite) for part in schema.get("allOf", ())):
        return False
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema and not any(_can_end(option, finite) for option in schema[keyword]):
            return False
    if schema.get("type") == "object":
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(_can_end(properties.get(name, others), finite) for name in schema.get("required", ()))
    if schema.get("type") == "array" and schema.get("minItems", 0) > 0:
        items = (*schema.get("prefixItems", ()), schema.get("items", True))
        return _can_end(items[0], finite)
    return True


def _set_bounds(result: dict[str, Any], pointer: str) -> None:
    """Draw bounds in to where every reader keeps a number, and with it whether it is a multiple."""
    limit = greatest_multiple(result["multipleOf"]) if "multipleOf" in result else SAFE_INTEGER
    low = least(result.pop("minimum", None), result.pop("exclusiveMinimum", None))
    high = greatest(result.pop("maximum", None), result.pop("exclusiveMaximum", None))
    if (low is not None and low > limit) or (high is not None and high < -limit):
        raise SchemaError(pointer, f"numbers beyond {limit} only are not supported here")
    if low is not None or "multipleOf" in result:
        result["minimum"] = -limit if low is None else max(low, -limit)
    if high is not None or "multipleOf" in result:
        result["maximum"] = limit if high is None else min(high, limit)


def _check_min_properties(result: dict[str, Any], pointer: str) -> None:
    """A name that is not listed may come twice, and then counts twice for llguidance."""
    if result.get("minProperties", 0) > len(set(result.get("required", ()))) + 1:
        raise SchemaError(
            f"{pointer}/minProperties",
            "'minProperties' is supported up to one more than the properties that are required",
        )


def _number(value: Any, pointer: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SchemaError(pointer, "this must be a number")
    try:
        is_finite = math.isfinite(value)
    except OverflowError:
        is_finite = False
    if not is_finite:
        raise SchemaError(pointer, "this number is too large")
    return value


def _list(value: Any, pointer: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise SchemaError(pointer, "this must be a list of at least one schema")
    return value


def _resolve(root: dict[str, Any], pointer: str) -> Any:
    """What a JSON pointer leads to, or None."""
    node: Any = root
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(step)
        elif isinstance(node, list) and step.isascii() and step.isdecimal() and int(step) < len(node):
            node = node[int(step)]
        else:
            return None
    return node
