"""Regular expressions of a request: read as ECMA-262 does in Unicode mode, written again in plain terms.

What comes out means the same to llguidance, whose own syntax is that of Rust's regex crate: there, `.` takes
in a carriage return, `[a&&b]` is an intersection and `\\<` begins a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LENGTH = 4_096  # characters
MAX_DEPTH = 32  # groups within groups
MAX_SIZE = 20_000  # characters and classes, each as often as its repetitions allow

_DIGIT = "0-9"
_WORD = "0-9A-Za-z_"
_SPACE = r"\x{9}-\x{d}\x{20}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_ANY_BUT_LINE_ENDS = r"[^\x{a}\x{d}\x{2028}\x{2029}]"
_CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
_QUANTIFIER = re.compile(r"[*+?]\??|\{([0-9]+)(?:(,)([0-9]*))?\}\??")
_UNBOUNDED = 16  # what `*` and `+` count as in a size


class PatternError(ValueError):
    """What is not supported or wrong in a pattern, and at which character."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message} at character {position}")
        self.position = position


def whole(pattern: str) -> str:
    """The pattern for texts that match from beginning to end. Raises PatternError."""
    return f"^(?:{'|'.join(alternative.text for alternative in _Reader(pattern).read())})$"


def anywhere(pattern: str) -> str:
    """The pattern, for whole texts, of those that match somewhere. Raises PatternError."""
    alternatives = []
    for part in _Reader(pattern).read():
        before = "" if part.at_start else "(?s:.*)"
        after = "" if part.at_end else "(?s:.*)"
        alternatives.append(f"{before}{part.text}{after}")
    return f"^(?:{'|'.join(alternatives)})$"


@dataclass(frozen=True, slots=True)
class _Part:
    """Something that was read: its text, its size, and whether it is held to the ends of the whole text."""

    text: str
    size: int
    at_start: bool = False
    at_end: bool = False


class _Reader:
    """Reads one pattern, from left to right."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_LENGTH:
            raise PatternError(f"the pattern is longer than {MAX_LENGTH} characters", MAX_LENGTH)
        self._pattern = pattern
        self._position = 0

    def read(self) -> list[_Part]:
        """The alternatives. `^` and `$` stand at their ends only."""
        alternatives = self._alternatives(0)
        if self._position < len(self._pattern):
            raise self._error("unmatched ')'")
        if sum(part.size for part in alternatives) > MAX_SIZE:
            raise self._error(f"with all repetitions the pattern has more than {MAX_SIZE} characters")
        return alternatives

    def _alternatives(self, depth: int) -> list[_Part]:
        if depth > MAX_DEPTH:
            raise self._error(f"groups are nested deeper than {MAX_DEPTH}")
        alternatives = self._alternative(depth)
        while self._take("|"):
            alternatives += self._alternative(depth)
        return alternatives

    def _alternative(self, depth: int) -> list[_Part]:
        """One alternative; several where it is a single group without a quantifier."""
        at_start = self._take("^")
        terms: list[list[_Part]] = []
        at_end = False
        while self._peek() not in ("", "|", ")"):
            if at_end:
                raise self._error("'$' is supported at the end of an alternative only")
            at_end = self._take("$")
            if not at_end:
                terms.append(self._term(depth))
        if len(terms) == 1 and len(terms[0]) > 0 and any(p.at_start or p.at_end for p in terms[0]):
            return [_Part(p.text, p.size, p.at_start or at_start, p.at_end or at_end) for p in terms[0]]
        for parts in terms:
            if any(part.at_start or part.at_end for part in parts):
                raise self._error("'^' and '$' are supported at the ends of the whole pattern only")
        joined = [_joined(parts) for parts in terms]
        return [_Part("".join(p.text for p in joined), sum(p.size for p in joined), at_start, at_end)]

    def _term(self, depth: int) -> list[_Part]:
        """The alternatives of a group, or one part."""
        parts = self._group(depth) if self._peek() == "(" else [_Part(self._atom(), 1)]
        match = _QUANTIFIER.match(self._pattern, self._position)
        if match is None:
            return parts
        if any(part.at_start or part.at_end for part in parts):
            raise self._error("'^' and '$' cannot be repeated")
        return [self._repeated(_joined(parts), match)]

    def _repeated(self, part: _Part, match: re.Match[str]) -> _Part:
        low, comma, high = match.groups()
        if low is None:
            count = 1 if match[0][0] == "?" else _UNBOUNDED
        elif max(len(low), len(high or "")) > 9 or (high and int(high) < int(low)):
            raise self._error("the bounds of this repetition are out of order or too large")
        else:
            count = int(high or low) if high or not comma else int(low) + _UNBOUNDED
        self._position = match.end()
        if _QUANTIFIER.match(self._pattern, self._position):
            raise self._error("there is nothing to repeat")
        size = part.size * max(count, 1)
        if size > MAX_SIZE:
            raise self._error(f"with all repetitions the pattern has more than {MAX_SIZE} characters")
        quantifier = match[0][0] if low is None else match[0].rstrip("?")
        return _Part(f"(?:{part.text}){quantifier}", size)

    def _group(self, depth: int) -> list[_Part]:
        self._position += 1
        if self._take("?"):
            name = re.compile(r":|<[A-Za-z_$][A-Za-z0-9_$]*>").match(self._pattern, self._position)
            if name is None:
                raise self._error("look-around and flags are not supported: this group")
            self._position = name.end()
        parts = self._alternatives(depth + 1)
        if not self._take(")"):
            raise self._error("a group is not closed")
        return parts

    def _atom(self) -> str:
        char = self._next()
        if char == ".":
            return _ANY_BUT_LINE_ENDS
        if char == "[":
            return self._class()
        if char == "\\":
            escape = self._escape()
            return escape if isinstance(escape, str) else _literal(escape)
        if char in "*+?{}]^":
            self._position -= 1
            raise self._error(f"{char!r} must be escaped, or has nothing to repeat, or is not supported here")
        return _literal(ord(char))

    def _class(self) -> str:
        negation = "^" if self._take("^") else ""
        items = []
        while not self._take("]"):
            low = self._class_item()
            if self._peek() == "-" and self._pattern[self._position + 1 : self._position + 2] not in (
                "]",
                "",
            ):
                self._position += 1
                high = self._class_item()
                if isinstance(low, str) or isinstance(high, str) or high < low:
                    raise self._error("a range of characters is out of order, or has a class for an end")
                items.append(f"{_literal(low)}-{_literal(high)}")
            else:
                items.append(low if isinstance(low, str) else _literal(low))
        if not items:
            raise self._error("an empty class is not supported")
        return f"[{negation}{''.join(items)}]"

    def _class_item(self) -> int | str:
        char = self._next("a class is not closed")
        if char != "\\":
            return ord(char)
        if self._take("b"):
            return 0x08
        return self._escape()

    def _escape(self) -> int | str:
        """The code point that an escape stands for, or a class in brackets."""
        char = self._next("the pattern ends in a backslash")
        if char.lower() in _CLASSES:
            return f"[{'^' if char.isupper() else ''}{_CLASSES[char.lower()]}]"
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "0" and not self._peek().isdigit():
            return 0
        if char in "xu":
            return self._code_point(char)
        if char in "pP":
            return self._property(char)
        if char == "c" and self._peek().isascii() and self._peek().isalpha():
            return ord(self._next()) % 32
        if char.isascii() and not char.isalnum():
            return ord(char)
        self._position -= 2
        raise self._error(f"'\\{char}' is not supported")

    def _code_point(self, kind: str) -> int:
        code = self._hexadecimal(kind)
        if 0xD800 <= code < 0xDC00 and self._pattern.startswith("\\u", self._position):
            self._position += 2
            low = self._hexadecimal("u")
            if 0xDC00 <= low < 0xE000:
                return 0x10000 + ((code - 0xD800) << 10) + low - 0xDC00
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise self._error("an escape stands for no character")
        return code

    def _hexadecimal(self, kind: str) -> int:
        form = r"[0-9A-Fa-f]{2}" if kind == "x" else r"[0-9A-Fa-f]{4}|\{[0-9A-Fa-f]{1,6}\}"
        match = re.compile(form).match(self._pattern, self._position)
        if match is None:
            raise self._error(f"'\\{kind}' is not followed by a character's number")
        self._position = match.end()
        return int(match[0].strip("{}"), 16)

    def _property(self, kind: str) -> str:
        match = re.compile(r"\{[A-Za-z_]+(=[A-Za-z_]+)?\}").match(self._pattern, self._position)
        if match is None:
            raise self._error(f"'\\{kind}' is not followed by a property in braces")
        self._position = match.end()
        return f"\\{kind}{match[0]}"

    def _peek(self) -> str:
        return self._pattern[self._position : self._position + 1]

    def _next(self, missing: str = "the pattern ends too early") -> str:
        char = self._peek()
        if not char:
            raise self._error(missing)
        self._position += 1
        return char

    def _take(self, char: str) -> bool:
        is_there = self._peek() == char
        self._position += is_there
        return is_there

    def _error(self, message: str) -> PatternError:
        return PatternError(message, self._position)


def _joined(parts: list[_Part]) -> _Part:
    """Alternatives as one part."""
    if len(parts) == 1:
        return parts[0]
    return _Part(f"(?:{'|'.join(part.text for part in parts)})", sum(part.size for part in parts))


def _literal(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:x}}}"
