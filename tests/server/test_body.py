from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

import jinn.server.body as body_module
from jinn.server.body import ArrivingBodies, parse_json_object
from jinn.server.errors import APIError
from jinn.server.limits import MAX_JSON_DEPTH


def error_of(body: bytes) -> APIError:
    with pytest.raises(APIError) as caught:
        parse_json_object(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    return caught.value


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "byte 0"),
        (b"{", "byte 1"),
        ('{"é": 1,}'.encode(), "byte 9"),
        (b'{"a": "\xff"}', "UTF-8 at byte 7"),
        (b'\xef\xbb\xbf{"a": 1}', "byte 0"),
        (b"[1]", "JSON object"),
        (b"null", "JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 60_000, "nested"),
        (b'{"\\ud800": 1}', "half a character"),
    ],
)
def test_broken_json(body: bytes, part: str) -> None:
    assert part in error_of(body).message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"temperature": NaN}', "temperature"),
        (b'{"a": {"b": [1, -Infinity]}}', "a.b[1]"),
        (b'{"temperature": 1e999}', "temperature"),
        (b'{"messages": [{"content": "x\\ud83d"}]}', "messages[0].content"),
        (b'{"a": ["\\udc00"]}', "a[0]"),
        (b'{"a": {"k": 1, "k": 2}}', "k"),
    ],
)
def test_the_field_is_named(body: bytes, param: str) -> None:
    assert error_of(body).param == param


def test_depth_is_counted_exactly() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    assert "a" in parse_json_object(nested(MAX_JSON_DEPTH))
    assert "nested" in error_of(nested(MAX_JSON_DEPTH + 1)).message


def test_good_json() -> None:
    body = '{"a": [1, 2.5, true, null, "é\\ud83d\\ude00"], "b": {}}'.encode()
    assert parse_json_object(body) == {"a": [1, 2.5, True, None, "é😀"], "b": {}}


async def test_the_body_begun_first_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "MAX_ARRIVING_BYTES", 12)
    bodies = ArrivingBodies()

    async def body(seconds: float) -> AsyncIterator[bytes]:
        yield b"12345"
        await asyncio.sleep(seconds)
        yield b"6"

    first, second = (asyncio.create_task(bodies.read(body(seconds))) for seconds in (60, 0.1))
    await asyncio.sleep(0)
    assert await bodies.read(body(0)) == b"123456"
    with pytest.raises(TimeoutError):
        await first
    assert await second == b"123456"
    for _ in range(3):
        assert await bodies.read(body(0)) == b"123456"
