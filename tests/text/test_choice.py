from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinn.engine.messages import FinishReason, SamplingParams, TokenLogprobs, TokenOutput
from jinn.text.choice import Choice, Delta
from server.fakes import EOS, ByteTokenizer


def run(
    data: bytes, sizes: Sequence[int] = (), *, ends_with_eos: bool = True, **sampling: object
) -> list[Delta]:
    """Feed `data` in pieces of `sizes` tokens, then the end, and collect the deltas."""
    choice = Choice(0, SamplingParams(**sampling), ByteTokenizer())
    has_logprobs = sampling.get("logprobs") is not None
    deltas = []
    sizes = list(sizes)
    while data and not choice.is_finished:
        size = sizes.pop(0) if sizes else 1
        piece, data = data[:size], data[size:]
        logprobs = tuple(TokenLogprobs(-float(byte)) for byte in piece) if has_logprobs else ()
        reason = None if data or ends_with_eos else FinishReason.LENGTH
        deltas.append(choice.take(TokenOutput("r", 0, tuple(piece), logprobs, finish_reason=reason)))
    if not choice.is_finished:
        logprobs = (TokenLogprobs(-1.0),) if has_logprobs else ()
        deltas.append(choice.take(TokenOutput("r", 0, (EOS,), logprobs, finish_reason=FinishReason.STOP)))
    assert choice.is_finished
    return [delta for delta in deltas if delta is not None]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_no_half_characters() -> None:
    deltas = run("a😀é".encode())
    assert [delta.text for delta in deltas] == ["a", "😀", "é", ""]
    assert deltas[-1].finish_reason == "stop"


def test_cut_character_at_the_end() -> None:
    deltas = run("a😀".encode()[:-1], ends_with_eos=False)
    assert text_of(deltas) == "a\ufffd"
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("sizes", [[1] * 40, [2] * 20, [3] * 14, [40]])
def test_stop_string_is_never_shown(sizes: list[int]) -> None:
    deltas = run(b"one two three", sizes, stop=(" tw", "zzz"))
    assert text_of(deltas) == "one"
    assert deltas[-1].finish_reason == "stop"


def test_held_text_comes_out_when_decided() -> None:
    assert [d.text for d in run(b"aEbEN", stop=("END",))] == ["a", "Eb", "EN"]


def test_stop_string_completed_by_the_last_token() -> None:
    deltas = run(b"abEND", ends_with_eos=False, stop=("END",))
    assert (text_of(deltas), deltas[-1].finish_reason) == ("ab", "stop")


def test_stop_strings_wait_for_min_tokens() -> None:
    deltas = run(b"END and END", stop=("END",), min_tokens=4)
    assert text_of(deltas) == "END and "


def test_tokens_of_a_stop_string_have_no_logprobs() -> None:
    deltas = run(b"abEND!", stop=("END",), logprobs=0)
    entries = [entry for delta in deltas for entry in delta.entries]
    assert [(e.token_id, e.text_offset) for e in entries] == [(ord("a"), 0), (ord("b"), 1)]


def test_logprobs_come_with_their_text() -> None:
    deltas = run("é!".encode(), logprobs=0)
    offsets = [(entry.token_id, entry.text_offset) for d in deltas for entry in d.entries]
    assert offsets == [(0xC3, 0), (0xA9, 0), (0x21, 1)]
    assert all(entry.logprobs.logprob == -entry.token_id for d in deltas for entry in d.entries)


@given(
    st.text(alphabet="aébc😀", max_size=30),
    st.lists(st.text(alphabet="aébc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 7), max_size=40),
)
def test_cut_anywhere_gives_the_same(text: str, stop: list[str], sizes: list[int]) -> None:
    deltas = run(text.encode(), sizes, stop=tuple(stop), logprobs=0)
    whole = run(text.encode(), [1000], stop=tuple(stop), logprobs=0)
    assert text_of(deltas) == text_of(whole)
    assert not any(text in text_of(deltas) for text in stop)
    assert [e for d in deltas for e in d.entries] == [e for d in whole for e in d.entries]
    assert deltas[-1].finish_reason == whole[-1].finish_reason == "stop"
