"""Random JSON schemas and patterns, mostly of what is supported, and mostly satisfiable."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any] | bool

_NAMES = ("id", "name", "a", "b/c", "d~e", "größe", 'say "hi"', "x-y", "n1", "", "items", "日本", "a b")
_WORDS = ("red", "green", "", "a\nb", 'q"q', "back\\slash", "😀", "null", "0")
_PATTERNS = (
    "^[a-z]+$",
    "^[A-Z]{2,4}-[0-9]{1,3}$",
    r"^\d{4}$",
    r"^\w+@\w+\.com$",
    "a|b",
    "^(yes|no|maybe)$",
    "^a.c$",
    r"\S",
    "^[^0-9]{1,5}$",
    r"^\+?[0-9 ()-]{3,10}$",
    r"^#(?:[0-9a-f]{3}){1,2}$",
    r"^\p{Lu}\p{Ll}*$",
    "x$",
    "^-?[0-9]+(\\.[0-9]+)?$",
    "",
)
FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
UNSUPPORTED: dict[str, Any] = {
    "not": {"type": "string"},
    "if": {"type": "string"},
    "contains": {"type": "string"},
    "uniqueItems": True,
    "propertyNames": {"pattern": "^a"},
    "dependentRequired": {"a": ["b"]},
    "unevaluatedProperties": False,
    "nullable": True,
    "minContains": 2,
    "$dynamicRef": "#a",
}


class SchemaMaker:
    """Makes schemas from one stream of random numbers. `share` is how often a keyword is unsupported."""

    def __init__(self, rng: random.Random, share: float = 0.0) -> None:
        self._rng = rng
        self._share = share

    def root(self) -> dict[str, Any]:
        """A schema, sometimes with definitions that refer to each other."""
        names = [f"D{i}" for i in range(self._rng.choice((0, 0, 1, 3)))]
        schema = self.schema(3, names)
        if not isinstance(schema, dict):
            schema = {"type": "object"}
        if names:
            schema = {**schema, "$defs": {name: self.schema(2, names) for name in names}}
        return schema

    def schema(self, depth: int, refs: list[str]) -> Schema:
        rng = self._rng
        kinds = [self.string, self.integer, self.number, self.enum, self.const, self.simple]
        if depth:
            kinds += [self.object, self.object, self.array, self.any_of, self.one_of, self.all_of]
        if refs and depth < 3 and rng.random() < 0.2:
            return {"$ref": f"#/$defs/{rng.choice(refs)}"}
        schema = rng.choice(kinds)(depth, refs)
        if isinstance(schema, dict) and rng.random() < 0.2:
            schema["description"] = "what it is for"
        if isinstance(schema, dict) and rng.random() < self._share:
            name = rng.choice(sorted(UNSUPPORTED))
            schema[name] = UNSUPPORTED[name]
        return schema

    def simple(self, _: int, __: list[str]) -> Schema:
        return self._rng.choice(
            [
                {"type": "null"},
                {"type": "boolean"},
                {"type": ["string", "null"]},
                {},
                True,
                {"type": "integer"},
            ]
        )

    def string(self, _: int, __: list[str]) -> Schema:
        rng = self._rng
        schema: dict[str, Any] = {"type": "string"}
        kind = rng.randrange(6)
        if kind == 0:
            schema["pattern"] = rng.choice(_PATTERNS)
        elif kind == 1:
            schema["format"] = rng.choice(FORMATS)
        elif kind == 2:
            schema["minLength"] = rng.randrange(4)
            schema["maxLength"] = rng.randrange(3, 12)
        elif kind == 3:
            schema["pattern"] = rng.choice(_PATTERNS)
            schema["maxLength"] = rng.randrange(3, 20)
        if rng.random() < 0.1:
            del schema["type"]
        return schema

    def integer(self, _: int, __: list[str]) -> Schema:
        return {"type": "integer", **self._bounds(lambda: self._rng.randrange(-120, 1200))}

    def number(self, _: int, __: list[str]) -> Schema:
        rng = self._rng
        return {"type": "number", **self._bounds(lambda: rng.choice([0, 1, -1, 0.5, rng.uniform(-9, 9)]))}

    def _bounds(self, draw: Any) -> dict[str, Any]:
        rng = self._rng
        low, high = sorted((draw(), draw()))
        bounds = {}
        if rng.random() < 0.5:
            bounds[rng.choice(["minimum", "exclusiveMinimum"])] = low
        if rng.random() < 0.5:
            bounds[rng.choice(["maximum", "exclusiveMaximum"])] = high
        if rng.random() < 0.15:
            bounds["multipleOf"] = rng.choice([1, 2, 5, 10, 0.5, 0.1, 0.25])
        return bounds

    def enum(self, _: int, __: list[str]) -> Schema:
        values = [*_WORDS, 0, 1, -3, 2.5, 1e-7, 12345678, True, None, [1, "a"], {"k": [1]}]
        return {"enum": self._rng.sample(values, self._rng.randrange(1, 6))}

    def const(self, _: int, __: list[str]) -> Schema:
        return {"const": self._rng.choice([*_WORDS, 7, -0.25, True, None, {"a": 1, "b": [None]}, []])}

    def object(self, depth: int, refs: list[str]) -> Schema:
        rng = self._rng
        names = rng.sample(_NAMES, rng.randrange(5))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.schema(depth - 1, refs) for name in names},
        }
        if names and rng.random() < 0.7:
            schema["required"] = rng.sample(names, rng.randrange(1, len(names) + 1))
        kind = rng.randrange(6)
        if kind < 3:
            schema["additionalProperties"] = False
        elif kind == 3:
            schema["additionalProperties"] = self.schema(depth - 1, refs)
        elif kind == 4:
            schema["patternProperties"] = {rng.choice(_PATTERNS[:3]): self.schema(depth - 1, refs)}
        if rng.random() < 0.1:
            schema[rng.choice(["minProperties", "maxProperties"])] = rng.randrange(3)
        return dict(rng.sample(list(schema.items()), len(schema)))

    def array(self, depth: int, refs: list[str]) -> Schema:
        rng = self._rng
        schema: dict[str, Any] = {"type": "array"}
        if rng.random() < 0.8:
            schema["items"] = self.schema(depth - 1, refs)
        if rng.random() < 0.2:
            schema["prefixItems"] = [self.schema(depth - 1, refs) for _ in range(rng.randrange(1, 3))]
        if rng.random() < 0.3:
            schema["minItems"] = rng.randrange(3)
        if rng.random() < 0.4:
            schema["maxItems"] = rng.randrange(2, 6)
        return schema

    def any_of(self, depth: int, refs: list[str]) -> Schema:
        return {"anyOf": [self.schema(depth - 1, refs) for _ in range(self._rng.randrange(1, 4))]}

    def one_of(self, _: int, refs: list[str]) -> Schema:
        """Objects told apart by a constant, as typed unions are."""
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "value": self.schema(0, refs)},
                    "required": ["kind", "value"],
                    "additionalProperties": False,
                }
                for kind in self._rng.sample(["a", "b", "c"], 2)
            ]
        }

    def all_of(self, depth: int, refs: list[str]) -> Schema:
        rng = self._rng
        if rng.random() < 0.5:
            return {"allOf": [self.schema(depth - 1, refs)], "description": "one"}
        parts = [
            {"type": "object", "properties": {name: self.schema(depth - 1, refs)}, "required": [name]}
            for name in rng.sample(_NAMES, 2)
        ]
        return {"allOf": parts}
