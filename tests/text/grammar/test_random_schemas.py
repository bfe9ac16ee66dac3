"""Every finished answer satisfies its schema, whatever the schema; checked with another implementation."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import jsonschema_rs
import pytest
from answers import matcher_of, parsed, walk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_schemas import UNSUPPORTED, SchemaMaker
from schema_corpus import CORPUS

from jinn.text.grammar.grammars import GrammarError, GrammarKind, grammar_text

MAX_SECONDS = 2.0


def compiled(schema):
    started = time.perf_counter()
    matcher = matcher_of(grammar_text(GrammarKind.JSON_SCHEMA, schema))
    assert time.perf_counter() - started < MAX_SECONDS
    return matcher


def refusal_of(schema):
    try:
        grammar_text(GrammarKind.JSON_SCHEMA, schema)
    except GrammarError as error:
        return error
    return None


def check_answers(schema, matcher, seed, count, outcomes):
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    for number in range(count):
        answer, outcome = walk(matcher.deep_copy(), random.Random(1_000 * seed + number))
        outcomes[outcome] += 1
        if outcome == "stop":
            value = parsed(answer)
            assert validator.is_valid(value), (seed, schema, answer)
        assert outcome != "dead end", (seed, schema, answer, matcher.get_error())


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_finished_answers_are_valid(count, capsys):
    outcomes = Counter()
    for seed in range(count):
        schema = SchemaMaker(random.Random(seed)).root()
        try:
            matcher = compiled(schema)
        except GrammarError:
            outcomes["refused"] += 1
            continue
        if matcher.is_error():  # no value satisfies it, or llguidance says what it lacks
            outcomes["refused"] += 1
            continue
        check_answers(schema, matcher, seed, 1, outcomes)
    with capsys.disabled():
        print(f"\n{count} schemas: {dict(outcomes)}")
    assert outcomes["stop"] >= 0.8 * count


@pytest.mark.parametrize("count", [300, pytest.param(3_000, marks=pytest.mark.soak)])
def test_unsupported_keywords_are_named(count):
    num_refused = 0
    for seed in range(count):
        schema = SchemaMaker(random.Random(seed), share=0.3).root()
        present = {name for name in UNSUPPORTED if f'"{name}":' in json.dumps(schema)}
        refusal = refusal_of(schema)
        if refusal is None:  # those that are left stand in definitions that nothing refers to
            text = grammar_text(GrammarKind.JSON_SCHEMA, schema)
            assert not any(f'"{name}"' in text for name in present)
        elif "without end" not in str(refusal) and "minProperties" not in str(refusal):
            name = refusal.pointer.rpartition("/")[2]
            assert name in present
            assert f"'{name}'" in str(refusal)
            num_refused += 1
    assert num_refused > count / 4


@pytest.mark.parametrize("name", CORPUS)
def test_schemas_as_people_write_them(name):
    matcher = compiled(CORPUS[name])
    assert not matcher.is_error(), matcher.get_error()
    outcomes = Counter()
    check_answers(CORPUS[name], matcher, 7, 20, outcomes)
    assert outcomes["stop"] >= 10, outcomes


@pytest.mark.parametrize(
    "schema",
    [
        {"multipleOf": 4_999},
        {"type": "integer", "multipleOf": 5_000},
        {"multipleOf": 1.375},
        {"type": "number", "multipleOf": 99.9},
        {"multipleOf": 0.3, "minimum": 17.1},
        {"type": "integer", "allOf": [{"multipleOf": 97}, {"multipleOf": 50}]},
        {"properties": {"a": {"multipleOf": 4_999}, "b": {"multipleOf": 4_993}}},
    ],
)
def test_multiples_are_soon_read_and_keep_their_digits(schema):
    outcomes = Counter()
    check_answers(schema, compiled(schema), 3, 40, outcomes)
    assert outcomes["stop"] >= 30, outcomes


_anything = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=6))
_keywords = {
    "type": st.one_of(st.sampled_from(["string", "number", "object", "array", "nothing"]), _anything),
    "enum": st.lists(_anything, max_size=4),
    "const": _anything,
    "minLength": _anything,
    "maxItems": st.one_of(st.integers(-2, 9), st.floats()),
    "minimum": st.one_of(st.floats(allow_nan=False, allow_infinity=False), _anything),
    "exclusiveMaximum": st.floats(-1e9, 1e9),
    "multipleOf": st.floats(0, 1e6),
    "pattern": st.one_of(st.text(alphabet="ab^$.*+?()[]{}|\\d-,1", max_size=8), _anything),
    "format": st.one_of(st.text(max_size=6), _anything),
    "required": st.lists(st.text(max_size=2), max_size=3),
    "$ref": st.one_of(st.sampled_from(["#", "#/properties/a", "#/allOf/0", "#/x", "a"]), _anything),
    "not": _anything,
}


def _schemas(keywords):
    """Objects of up to four of these keywords."""
    pairs = st.one_of(*(st.tuples(st.just(name), values) for name, values in keywords.items()))
    return st.lists(pairs, max_size=4, unique_by=lambda pair: pair[0]).map(dict)


_leaves = _schemas(_keywords)
_nodes = _schemas(
    {
        **_keywords,
        "properties": st.dictionaries(st.sampled_from("ab"), _leaves),
        "items": st.one_of(_leaves, _anything),
        "anyOf": st.lists(_leaves, max_size=3),
        "oneOf": st.lists(_leaves, max_size=3),
        "allOf": st.lists(_leaves, max_size=2),
    }
)


@pytest.mark.parametrize("count", [200, pytest.param(2_000, marks=pytest.mark.soak)])
def test_schemas_that_may_make_no_sense(count):
    """Such a schema is followed or refused; it never raises anything else."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(_nodes)
    def check(schema):
        try:
            matcher = compiled(schema)
            jsonschema_rs.validator_for(schema)
        except (GrammarError, ValueError):  # jsonschema-rs reads schemas more strictly
            return
        if matcher.is_error():
            return
        check_answers(schema, matcher, 1, 1, Counter())

    check()
