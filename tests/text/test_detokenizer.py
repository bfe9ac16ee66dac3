from __future__ import annotations

import random
import time

import official
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinn.text.detokenizer import Detokenizer, StopStrings
from jinn.text.tokenizer import Tokenizer

EMOJI = "👩‍👩‍👧 漢字 é"


def pushed(tokenizer: Tokenizer, chunks: list[list[int]], *, skip_special: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


def cut(rng: random.Random, ids: list[int]) -> list[list[int]]:
    chunks, position = [], 0
    while position < len(ids):
        length = rng.choice((0, 1, 1, 1, 2, 5))
        chunks.append(ids[position : position + length])
        position += length
    return chunks


def random_ids(rng: random.Random, tokenizer: Tokenizer, byte_ids: list[int]) -> list[int]:
    """Single bytes, whole tokens, control tokens and ids without text."""
    kinds = (
        byte_ids,
        range(tokenizer.vocab_size),
        list(tokenizer.special_ids),
        (-1, tokenizer.vocab_size + 5),
    )
    return [rng.choice(rng.choices(kinds, (6, 3, 1, 0.2))[0]) for _ in range(rng.randint(0, 40))]


@pytest.mark.parametrize("count", [3_000, pytest.param(30_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_pieces_join_to_the_whole_decode_and_are_never_half(name: str, count: int) -> None:
    tokenizer = official.smollm2() if name == "smollm2" else official.official(name)
    byte_ids = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    assert len(byte_ids) > 230
    rng = random.Random(3)
    for _ in range(count):
        ids, skip_special = random_ids(rng, tokenizer, byte_ids), rng.random() < 0.5
        whole = tokenizer.decode(ids, skip_special=skip_special)
        pieces = pushed(tokenizer, cut(rng, ids), skip_special=skip_special)
        assert "".join(pieces) == whole
        position = 0
        for piece in pieces:  # so no U+FFFD that the whole decode has not, and none taken back
            assert whole.startswith(piece, position)
            position += len(piece)


def test_a_code_point_comes_with_its_last_byte() -> None:
    tokenizer = official.smollm2()
    ids = tokenizer.encode(EMOJI)
    content, pieces = b"", pushed(tokenizer, [[i] for i in ids])
    for token_id, piece in zip(ids, pieces, strict=False):
        before = content.decode("utf-8", "ignore")
        content += tokenizer.token_bytes(token_id)
        assert before + piece == content.decode("utf-8", "ignore")
    assert pieces[-1] == ""


def test_a_cut_code_point_is_one_replacement_character_at_the_end() -> None:
    tokenizer = official.smollm2()
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b"\xf0", b"\x9f")]
    ids.sort(key=tokenizer.token_bytes, reverse=True)
    assert pushed(tokenizer, [[i] for i in ids]) == ["", "", "�"] == ["", "", tokenizer.decode(ids)]


def test_special_tokens_are_skipped_as_asked() -> None:
    tokenizer = official.smollm2()
    ids = tokenizer.encode("a<|im_end|>b")
    assert pushed(tokenizer, [ids]) == ["ab", ""]
    assert pushed(tokenizer, [ids], skip_special=False) == ["a<|im_end|>b", ""]


def test_a_long_stream_costs_the_same_per_token() -> None:
    tokenizer = official.smollm2()
    detokenizer = Detokenizer(tokenizer)
    start = time.perf_counter()
    for _ in range(100_000):
        detokenizer.push((19556,))
    assert time.perf_counter() - start < 5  # about 0.2 s; decoding again each time would take minutes


def plain_stop(stop: list[str], text: str) -> tuple[str, bool]:
    """The definition: grow the text until it ends with a stop string, and drop the longest such."""
    for end in range(1, len(text) + 1):
        if matches := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, matches))], True
    return text, False


def streamed_stop(stop: list[str], chunks: list[str]) -> tuple[list[str], bool]:
    strings, emitted = StopStrings(stop), []
    for chunk in chunks:
        text, stopped = strings.push(chunk)
        emitted.append(text)
        if stopped:
            return emitted, True
    return [*emitted, strings.flush()], False


@given(
    st.lists(st.text("ab🎉", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("ab🎉", max_size=4), max_size=12),
)
def test_stop_strings_are_found_wherever_the_stream_is_cut(stop: list[str], chunks: list[str]) -> None:
    emitted, stopped = streamed_stop(stop, chunks)
    assert ("".join(emitted), stopped) == plain_stop(stop, "".join(chunks))


@given(st.text("ab", min_size=1, max_size=5), st.lists(st.text("ab", max_size=4), max_size=8))
def test_only_what_may_start_a_stop_string_is_held_back(stop: str, chunks: list[str]) -> None:
    strings, seen, emitted = StopStrings([stop]), "", ""
    for chunk in chunks:
        text, stopped = strings.push(chunk)
        seen, emitted = seen + chunk, emitted + text
        if stopped:
            break
        held = seen[len(emitted) :]
        longest = next(n for n in range(len(stop), -1, -1) if seen.endswith(stop[:n]))
        assert held == stop[:longest]


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_a_stop_string_across_tokens_and_characters_never_leaks(name: str) -> None:
    tokenizer = official.smollm2() if name == "smollm2" else official.official(name)
    text = f"before {EMOJI} stop here 👍🏽 after"
    detokenizer, strings = Detokenizer(tokenizer), StopStrings(["字 é stop", "never"])
    emitted = ""
    for token_id in tokenizer.encode(text):
        piece, stopped = strings.push(detokenizer.push((token_id,)))
        emitted += piece
        assert text.startswith(emitted)
        if stopped:
            break
    assert emitted == "before 👩‍👩‍👧 漢"
    assert strings.matched == "字 é stop"
    assert strings.push("more") == ("", True)


def test_the_first_to_be_complete_wins_and_the_longest_of_those() -> None:
    assert streamed_stop(["abcdef", "cd"], ["abcdef"]) == (["ab"], True)
    assert streamed_stop(["cd", "bcd"], ["ab", "cd"]) == (["a", ""], True)


def test_text_held_at_the_end_is_flushed_once() -> None:
    strings = StopStrings(["END"])
    assert strings.push("the EN") == ("the ", False)
    assert strings.flush() == "EN"
    assert strings.flush() == ""
    assert strings.push("D") == ("D", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        StopStrings(["a", ""])


def test_without_stop_strings_all_text_passes() -> None:
    assert streamed_stop([], ["a", "b"]) == (["a", "b", ""], False)


def test_a_near_miss_is_read_in_linear_time() -> None:
    strings = StopStrings(["a" * 10_000 + "b"])
    start = time.perf_counter()
    for _ in range(200_000):
        strings.push("a")
    assert time.perf_counter() - start < 10
