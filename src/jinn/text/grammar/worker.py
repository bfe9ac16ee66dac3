"""Compiles grammars for one parent: a line of JSON in, `[kind, value]`; a line out, the grammar or why not.

It is a process of its own because a grammar may take long, or bring the compiler down: `python -m
jinn.text.grammar.worker`. It ends with its standard input.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any, cast

import llguidance

from jinn.engine.constraint import first_line, parser_limits
from jinn.text.grammar.grammars import GrammarError, GrammarKind, grammar_text
from jinn.text.grammar.json_schema import escape_pointer
from jinn.text.tools import TOOL_FORMATS

_MAX_MEMORY = 2 * 2**30  # bytes of address space
_MAX_STACK = 4 * 2**20  # half of what the engine's threads have
_MAX_CULPRITS = 16  # keywords that are left out, one by one, to find which is to blame

# What llguidance says, and the keywords that it says it of.
_SUBJECTS = {
    "oneOf": ("oneOf",),
    "patternProperty": ("patternProperties",),
    "min/maxProperties": ("minProperties", "maxProperties"),
    "circular references": ("$ref",),
}


class _Bytes:
    """For llguidance: single bytes, and the control tokens of every format of calls."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self) -> None:
        controls = dict.fromkeys(text for known in TOOL_FORMATS.values() for text in known.control_texts)
        self.tokens = [*(bytes([byte]) for byte in range(256)), *map(str.encode, controls), b"<eos>"]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id = len(self.tokens) - 1

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


_WRAPPER = _Bytes()
TOKENS = tuple(_WRAPPER.tokens)
TOKENIZER = llguidance.LLTokenizer(cast(llguidance.TokenizerWrapper, _WRAPPER))
_BYTES = llguidance.LLTokenizer("byte")  # knows no control token, so that no client's grammar can name one


def compiled(kind: GrammarKind, value: Any) -> str:
    """The grammar's text, which llguidance takes and which leaves something to write. Raises GrammarError."""
    text = grammar_text(kind, value)
    error = _error_of(text, TOKENIZER if kind is GrammarKind.CALLS else _BYTES)
    if error is None:
        return text
    if kind is GrammarKind.JSON_SCHEMA and (culprit := _culprit(value, error)):
        keyword = culprit.rpartition("/")[2]
        raise GrammarError(f"the keyword '{keyword}' is not supported here: {error}", culprit)
    raise GrammarError(error)


def _error_of(text: str, tokenizer: llguidance.LLTokenizer = _BYTES) -> str | None:
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
        if not matcher.is_error() and matcher.is_stopped() and not matcher.is_accepting():
            return "no answer satisfies it"
    return first_line(matcher.get_error()) if matcher.is_error() else None


def _culprit(schema: Any, error: str) -> str | None:
    """The JSON pointer of the keyword without which the error would be another, or none."""
    keywords = next((names for said, names in _SUBJECTS.items() if said in error), ())
    places = _places(schema, "", keywords)[:_MAX_CULPRITS]
    if len(places) == 1:
        return places[0][0]
    for pointer, node, keyword in places:
        value = node.pop(keyword)
        try:
            if _error_of(grammar_text(GrammarKind.JSON_SCHEMA, schema)) != error:
                return pointer
        except GrammarError:
            continue
        finally:
            node[keyword] = value
    return places[0][0] if places else None


def _places(node: Any, pointer: str, keywords: tuple[str, ...]) -> list[tuple[str, dict[str, Any], str]]:
    """Where the keywords stand: pointer, object and keyword."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    places = []
    for key, value in items:
        where = f"{pointer}/{escape_pointer(key)}"
        if isinstance(node, dict) and key in keywords:
            places.append((where, node, str(key)))
        places += _places(value, where, keywords)
    return places


def _answer(line: str) -> dict[str, Any]:
    kind, value = json.loads(line)
    try:
        return {"text": compiled(GrammarKind(kind), value)}
    except GrammarError as error:
        return {"error": str(error), "pointer": error.pointer}
    except RecursionError:
        return {"error": "it is nested too deeply", "pointer": ""}


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_STACK, (_MAX_STACK, _MAX_STACK))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        print(json.dumps(_answer(line)), flush=True)


if __name__ == "__main__":
    main()
