"""Each form of a grammar, and what is refused."""

from __future__ import annotations

import json

import pytest
from answers import accepts, matcher_of

from jinn.text.grammar.grammars import (
    MAX_CHOICES,
    MAX_GRAMMAR_LENGTH,
    GrammarError,
    GrammarKind,
    grammar_text,
)

CHOICES = ["a", "ab", "", 'q"x', "new\nline", "back\\s", "é😀", "/slash/", "\x01"]
GBNF = r"""
root ::= "yes" ws | object
object ::= "{" ws "\"a\":" number "}"
number ::= [0-9]+ ("." [0-9]{1,2})?
ws ::= [ \t\n]*
"""


def test_a_choice_is_one_of_the_texts_and_no_other():
    text = grammar_text(GrammarKind.CHOICE, CHOICES)
    assert [choice for choice in CHOICES if not accepts(text, choice)] == []
    assert [other for other in ("abc", "b", "a\n", "é") if accepts(text, other)] == []


@pytest.mark.parametrize("pattern", [r"^[0-9]+/[0-9]+$", r"[0-9]+/[0-9]+"])
def test_a_regex_holds_for_the_whole_answer(pattern):
    text = grammar_text(GrammarKind.REGEX, pattern)
    assert accepts(text, "12/3")
    assert [other for other in ("12/", "x1/2", "1/2\n", " 1/2") if accepts(text, other)] == []


def test_a_grammar_is_gbnf_or_lark():
    gbnf = grammar_text(GrammarKind.GRAMMAR, GBNF)
    assert accepts(gbnf, '{ "a":1.25}')
    assert accepts(gbnf, "yes\n")
    assert not accepts(gbnf, '{"a":1.250}')
    lark = grammar_text(GrammarKind.GRAMMAR, 'start: word+ "!"\nword: /[xy]/ | "z"i\n%ignore " "')
    assert accepts(lark, "x y Z!")
    assert not accepts(lark, "a!")


def test_any_json_object():
    text = grammar_text(GrammarKind.JSON_OBJECT, None)
    assert accepts(text, '{"a": [1, null, {"b": "c"}]}')
    assert [other for other in ("[]", "1", '{"a":}', "{} ") if accepts(text, other)] == []


def test_white_space_lays_out_and_no_more():
    text = grammar_text(GrammarKind.JSON_OBJECT, None)
    value = {"a": [1, {"b": [], "c": {}}], "d": "e"}
    for indent in (None, 1, 2, 4, 8, "\t"):
        assert accepts(text, json.dumps(value, indent=indent)), indent
        assert accepts(text, json.dumps(value, indent=indent).replace("\n", "\r\n")), indent
    assert accepts(text, '{ "a" : 1\n}')
    for space in ("\n\n", "   ", " \n", "\n" + " " * 33, "\t\t"):
        assert not accepts(text, "{" + space + "}"), space
        assert not accepts(text, '{"a":' + space + "1}"), space


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json_schema", {"not": {}}, "'not'"),
        ("json_schema", [], "object"),
        ("regex", 1, "string"),
        ("regex", "(?=a)", "character 2"),
        ("choice", [], "1 to"),
        ("choice", "a", "list"),
        ("choice", ["a", 1], "list of strings"),
        ("choice", ["a"] * (MAX_CHOICES + 1), str(MAX_CHOICES)),
        ("grammar", "", "1 to"),
        ("grammar", "a" * (MAX_GRAMMAR_LENGTH + 1), str(MAX_GRAMMAR_LENGTH)),
        ("grammar", 'start: %json {"x-guidance":{"lenient":true}}', "%json"),
        ("grammar", '%llguidance {"allow_invalid_utf8":true}\nstart: "a"', "%llguidance"),
        ("grammar", "a[temperature=1]: /b/", "temperature"),
        ("grammar", "root ::= *a", "Expected name"),
        ("grammar", "root ::= " + "(" * 60_000, "recursion"),
    ],
)
def test_refusals(kind, value, message):
    with pytest.raises(GrammarError, match=message):
        grammar_text(GrammarKind(kind), value)


@pytest.mark.parametrize("text", ["start: nobody", "start: <|im_end|>", "start: /a(?=b)/", "start: (", "{}"])
def test_what_llguidance_refuses(text):
    assert matcher_of(grammar_text(GrammarKind.GRAMMAR, text)).is_error()
