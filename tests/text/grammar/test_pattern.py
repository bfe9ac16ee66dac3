"""Patterns, against Python's `re` where the two syntaxes agree, and where they do not, by hand."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from answers import accepts
from hypothesis import given, settings
from hypothesis import strategies as st

from jinn.text.grammar.grammars import GrammarKind, grammar_text
from jinn.text.grammar.pattern import MAX_SIZE, PatternError, anywhere, whole

TEXTS = ["".join(letters) for length in range(4) for letters in itertools.product("ab1 ", repeat=length)]


def matches_somewhere(pattern, text):
    return accepts(
        grammar_text(GrammarKind.JSON_SCHEMA, {"type": "string", "pattern": pattern}),
        json.dumps(text, ensure_ascii=False),
    )


_pieces = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", r"\d", r"\s", r"\w", "(a|b1)", "(?:b|)", "(1{1,2})"]
)
_terms = st.tuples(_pieces, st.sampled_from(["", "", "*", "+", "?", "{2}", "*?"])).map("".join)
_branches = st.tuples(
    st.sampled_from(["", "^"]), st.lists(_terms, max_size=3).map("".join), st.sampled_from(["", "$"])
).map("".join)
_patterns = st.lists(_branches, min_size=1, max_size=2).map("|".join)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_patterns)
def test_the_same_texts_match_as_in_python(pattern):
    for text in TEXTS[::3]:
        assert matches_somewhere(pattern, text) == bool(re.search(pattern.replace("$", r"\Z"), text)), text
        assert accepts(grammar_text(GrammarKind.REGEX, pattern), text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize(
    ("pattern", "taken", "refused"),
    [
        ("^.$", ["x", "é", "😀"], ["\r", "\u2028", "\n"]),
        (r"^\s$", [" ", "\ufeff", "\u00a0"], ["\x85", "\u180e"]),
        (r"^\d$", ["7"], ["\u0667"]),
        (r"^\w$", ["_"], ["é"]),
        (r"^[^\s]$", ["\x85"], ["\ufeff"]),
        ("^[a&&b]$", ["a", "&"], ["ab"]),
        ("^[a[b]$", ["a", "[", "b"], ["]"]),
        (r"^\u00e9\x41\u{1F600}\uD83D\uDE00$", ["éA😀😀"], ["é"]),
        (r"^[\b]\cA\0$", [], ["x"]),
        (r"^\p{Lu}\P{L}$", ["É1"], ["é1"]),
        ("(^a$|^b$)", ["a", "b"], ["ab", "xa"]),
        ("^(?<year>[0-9]{4})$", ["1999"], ["99"]),
        ("<b>", ["a <b> c"], ["b"]),
    ],
)
def test_ecma_262_is_followed(pattern, taken, refused):
    assert [text for text in taken if not matches_somewhere(pattern, text)] == []
    assert [text for text in refused if matches_somewhere(pattern, text)] == []


@pytest.mark.parametrize(
    ("pattern", "position"),
    [
        ("(?=a)", 2),
        ("a(?!b)", 3),
        ("(?i)a", 2),
        (r"a\b", 1),
        (r"(a)\1", 3),
        (r"\A", 0),
        ("a**", 2),
        ("*a", 0),
        ("a{2,1}", 1),
        ("a{,5}", 1),
        ("a{9999999999}", 1),
        ("[b-a]", 4),
        (r"[\w-a]", 5),
        ("[]", 2),
        ("[a", 2),
        ("(a", 2),
        ("a)", 1),
        ("a\\", 2),
        (r"\uD800", 6),
        (r"\u{110000}", 10),
        ("x^y", 1),
        ("(^a)*", 4),
        ("(^a)b", 5),
    ],
)
def test_refusals_tell_the_character(pattern, position):
    for read in (whole, anywhere):
        with pytest.raises(PatternError) as caught:
            read(pattern)
        assert caught.value.position == position


@pytest.mark.parametrize(
    "pattern",
    ["(" * 60_000, "(" * 40 + ")" * 40, "((a{100}){100}){100}", f"a{{{MAX_SIZE + 1}}}", "a" * 5_000],
)
def test_patterns_are_bounded(pattern):
    with pytest.raises(PatternError):
        whole(pattern)
