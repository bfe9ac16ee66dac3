"""Answers held to JSON and other grammars, through every field that says so."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest

from jinn.server import grammar_compiler
from jinn.server.errors import APIError
from jinn.server.grammar_compiler import GrammarCompiler
from jinn.text.grammar import formats, grammars, json_schema, pattern

from .conftest import chat_body
from .fakes import FakeEngine
from .real import RealServer
from .test_app import CHAT, check_error

COMPLETIONS = "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "maximum": 10**8},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}}
GBNF = 'root ::= ("red" | "blue") " " [0-9]{2}'

WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "json_schema": ({"response_format": FORMAT}, '"city"'),
    "json_object": ({"response_format": {"type": "json_object"}}, '"object"'),
    "json_object with a schema": ({"response_format": {"type": "json_object", "schema": SCHEMA}}, '"city"'),
    "structured json": ({"structured_outputs": {"json": SCHEMA}}, '"city"'),
    "structured json_object": ({"structured_outputs": {"json_object": True}}, '"object"'),
    "structured regex": ({"structured_outputs": {"regex": "a+"}}, "start: /"),
    "structured choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, 'start: "yes" | "no"'),
    "structured grammar": ({"structured_outputs": {"grammar": GBNF}}, "start:"),
    "guided_json": ({"guided_json": SCHEMA}, '"city"'),
    "guided_regex": ({"guided_regex": "a+"}, "start: /"),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, 'start: "yes" | "no"'),
    "guided_grammar": ({"guided_grammar": GBNF}, "start:"),
    "json_schema of llama.cpp": ({"json_schema": SCHEMA}, '"city"'),
    "grammar of llama.cpp": ({"grammar": GBNF}, "start:"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_each_field_reaches_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, way: str, path: str
) -> None:
    fields, expected = WAYS[way]
    body = chat_body(**fields) if path == CHAT else {"prompt": "x", **fields}
    assert (await client.post(path, json=body)).status_code == 200
    grammar = engine.submitted[0].grammar
    assert grammar is not None
    assert expected in grammar.text


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"grammar": ""},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
    ],
)
async def test_what_asks_for_nothing(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any]
) -> None:
    assert (await client.post(CHAT, json=chat_body(**fields))).status_code == 200
    assert engine.submitted[0].grammar is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "text", "json_schema": FORMAT["json_schema"]}},
        "response_format.json_schema",
    ),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        "response_format.json_schema.schema#/not",
    ),
    ({"guided_json": {"properties": {"a/b": {"if": {}}}}}, "guided_json#/properties/a~1b/if"),
    ({"guided_json": {"items": {"oneOf": [{"minimum": 1}, {"maximum": 2}]}}}, "guided_json#/items/oneOf"),
    ({"guided_json": {"type": "string", "enum": [1]}}, "guided_json"),
    ({"guided_regex": "a(?=b)"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [1]}, "guided_choice[0]"),
    ({"guided_grammar": "start: nobody"}, "guided_grammar"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ({"response_format": FORMAT, "grammar": GBNF}, "grammar"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[param for _, param in REFUSED])
async def test_refusals(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert check_error(await client.post(CHAT, json=chat_body(**fields)), 400)["param"] == param


def compile_once(compiler: GrammarCompiler, *values: Any) -> list[str]:
    """For each schema the grammar, or the refusal's message."""

    async def compile_all() -> list[str]:
        results = await asyncio.gather(
            *(compiler.compile("json_schema", value, "p") for value in values), return_exceptions=True
        )
        assert all(isinstance(result, str | APIError) for result in results), results
        return [result if isinstance(result, str) else result.message for result in map(_known, results)]

    return asyncio.run(compile_all())


def _known(result: str | BaseException) -> str | APIError:
    if isinstance(result, str | APIError):
        return result
    raise result


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler()
    yield compiler
    compiler.close()


# Says it is ready, then does what a grammar might make a compiler do.
SLOW = "print('{}', flush=True); input(); input(); import time; time.sleep(60)"
DYING = "print('{}', flush=True); input(); input(); import os; os.abort()"


@pytest.mark.parametrize(("script", "message"), [(SLOW, "more than 0.2 seconds"), (DYING, "too complex")])
def test_a_grammar_that_takes_too_long_or_ends_the_compiler(
    monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    monkeypatch.setattr(grammar_compiler, "COMPILE_SECONDS", 0.2)
    compiler = GrammarCompiler((sys.executable, "-c", f"import os; os.environ.clear(); {script}"))
    try:
        started = time.monotonic()
        assert message in compile_once(compiler, {})[0]
        assert time.monotonic() - started < 5
        assert compiler._process is None
    finally:
        compiler.close()


def test_the_compiler_goes_on_after_a_bad_grammar(compiler: GrammarCompiler) -> None:
    good, bad, other = compile_once(compiler, {"type": "object"}, {"not": {}}, {"type": "array"})
    assert "object" in good
    assert "'not' is not supported (at '/not')" in bad
    assert "array" in other


def test_what_is_kept_is_bounded(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "_MAX_KEPT_BYTES", 1_000)
    compile_once(compiler, *({"const": f"value {number}"} for number in range(40)))
    assert compiler._kept_bytes <= 1_000
    assert 0 < len(compiler._kept) < 40


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[RealServer]:
    server = RealServer(str(smollm2_path), "--cache-memory", str(64 * 2**20), "--max-model-len", "2048")
    try:
        yield server
    finally:
        assert server.stop() == 0


@pytest.fixture
def real(server: RealServer) -> Iterator[openai.OpenAI]:
    base_url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(api_key="none", base_url=base_url, max_retries=0) as client:
        yield client


MESSAGES: list[Any] = [{"role": "user", "content": "Tell me of Paris, as JSON."}]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1, "seed": 1, "n": 2, "logprobs": True, "top_logprobs": 3, "stop": ['"', "Paris"]},
    {"temperature": 1, "seed": 4, "extra_body": {"min_tokens": 60, "top_k": 20, "ignore_eos": True}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_real_model_follows_a_schema(real: openai.OpenAI, settings: dict[str, Any]) -> None:
    body = {
        "model": "default",
        "messages": MESSAGES,
        "response_format": FORMAT,
        "max_tokens": 120,
        **settings,
    }
    whole = real.chat.completions.create(**body)
    texts = [choice.message.content or "" for choice in whole.choices]
    for choice, text in zip(whole.choices, texts, strict=True):
        assert choice.finish_reason == "stop"
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(text))
    streamed = [""] * len(texts)
    for chunk in real.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_an_answer_cut_by_max_tokens_says_so(real: openai.OpenAI) -> None:
    answer = real.chat.completions.create(
        model="default", messages=MESSAGES, response_format=FORMAT, max_tokens=4, temperature=0
    )
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_regex": "[A-Z][a-z]{2,9}, [0-9]{4}"}, "[A-Z][a-z]{2,9}, [0-9]{4}"),
        ({"guided_choice": ["Paris", "London", "Rome"]}, "Paris|London|Rome"),
        ({"grammar": GBNF}, "(red|blue) [0-9]{2}"),
    ],
)
def test_a_real_model_follows_other_grammars(
    real: openai.OpenAI, fields: dict[str, Any], expected: str
) -> None:
    for seed in range(4):
        answer = real.completions.create(
            model="default",
            prompt="The answer is",
            max_tokens=60,
            temperature=2,
            seed=seed,
            extra_body=fields,
        )
        assert re.fullmatch(expected, answer.choices[0].text)
        assert answer.choices[0].finish_reason == "stop"


PAGE = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```json(?: (\w+))?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("kind", "text"), EXAMPLES, ids=[text[:40] for _, text in EXAMPLES])
async def test_the_pages_examples(
    client: httpx.AsyncClient, engine: FakeEngine, kind: str, text: str
) -> None:
    if kind == "answer":
        return  # compared with the request before it
    body = json.loads(text)
    response = await client.post(CHAT if "messages" in body else COMPLETIONS, json=body)
    if kind == "refused":
        answers = [json.loads(text) for kind, text in EXAMPLES if kind == "answer"]
        assert response.json() in answers
    else:
        assert response.status_code == 200
        assert engine.submitted[0].grammar is not None


def test_the_pages_limits() -> None:
    section = PAGE[PAGE.index("## Limits") :]
    numbers = {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", section)}
    assert numbers >= {
        grammar_compiler.MAX_BYTES // 1024,
        json_schema.MAX_SUBSCHEMAS,
        json_schema.MAX_DEPTH,
        json_schema.MAX_ENUM_VALUES,
        json_schema.MAX_CHARACTERS,
        pattern.MAX_LENGTH,
        pattern.MAX_DEPTH,
        pattern.MAX_SIZE,
        grammars.MAX_GRAMMAR_LENGTH,
        grammars.MAX_CHOICES,
        int(grammar_compiler.COMPILE_SECONDS),
    }


def test_the_pages_keywords() -> None:
    start = PAGE.index("| Keywords |")
    table = PAGE[start : PAGE.index("\n\n", start)]
    named = set(re.findall(r"`([$\w]+)`", table))
    supported = set(json_schema._KEYWORDS) - {"additionalItems", "uniqueItems", "$schema", "$id"}
    assert named >= supported | set(formats.FORMATS) - {"date-time"}
