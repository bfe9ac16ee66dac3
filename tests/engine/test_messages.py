from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jinn.engine.frames import FrameReader, frame
from jinn.engine.messages import (
    MAX_SEED,
    Abort,
    EngineStats,
    Failed,
    FinishReason,
    Loading,
    Prefilling,
    Ready,
    SamplingParams,
    Shutdown,
    Start,
    StepOutput,
    Submit,
    ThinkingBudget,
    TokenLogprobs,
    TokenOutput,
    decode,
    encode,
)

text = st.text(st.characters(), max_size=8)  # surrogates too
token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=8).map(tuple)
logprobs = st.builds(
    TokenLogprobs,
    st.floats(width=32, max_value=0),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(width=32, max_value=0)), max_size=3).map(tuple),
)
sampling = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
    stop=st.lists(text.filter(bool), max_size=2).map(tuple),
    stop_token_ids=token_ids,
    ignore_eos=st.booleans(),
    seed=st.none() | st.integers(0, MAX_SEED),
    thinking_budget=st.none() | st.just(ThinkingBudget(5, None, 2, (1, 2))),
)
outputs = st.builds(
    TokenOutput,
    text,
    st.integers(0, 127),
    token_ids,
    st.lists(logprobs, max_size=2).map(tuple),
    *[st.integers(0, 2**31)] * 3,
    st.none() | st.sampled_from(FinishReason),
    st.none() | text,
)
stats = st.builds(EngineStats, *[st.integers(0, 2**53)] * len(fields(EngineStats)))
messages = st.one_of(
    st.builds(Submit, text, text, token_ids, sampling, turn_starts=token_ids),
    st.builds(Abort, text, st.none() | st.integers(0, 127)),
    st.just(Shutdown()),
    st.builds(Start, st.text()),
    st.builds(Loading, st.integers(0, 2**50), st.integers(0, 2**50)),
    st.builds(Ready, *[st.integers(0, 2**31)] * 5, token_ids, text, st.lists(text, max_size=2).map(tuple)),
    st.builds(Failed, text),
    st.builds(
        StepOutput,
        st.lists(outputs, max_size=3).map(tuple),
        st.lists(st.builds(Prefilling, text, *[st.integers(0, 9)] * 3), max_size=2).map(tuple),
        stats,
    ),
)


@given(messages)
def test_a_message_survives_the_wire(message):
    back = decode(encode(message))
    assert back == message
    assert type(back) is type(message)


@given(st.lists(messages, max_size=4), st.integers(1, 50))
def test_frames_survive_any_cutting(sent, size):
    stream = b"".join(map(frame, sent))
    reader = FrameReader()
    received = [part for i in range(0, len(stream), size) for part in reader.feed(stream[i : i + size])]
    assert list(map(decode, received)) == sent


def test_float32_bits_survive():
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32).view(np.float32)
    values = [float(v) for v in bits[np.isfinite(bits)]] + [-0.0, -math.inf, 1e-45]
    message = StepOutput(
        (TokenOutput("r", 0, (1,), tuple(TokenLogprobs(v) for v in values)),), (), EngineStats()
    )
    back = decode(encode(message))
    assert [entry.logprob.hex() for entry in back.outputs[0].logprobs] == [v.hex() for v in values]


@settings(max_examples=300)
@given(messages, st.data())
def test_what_is_not_a_message_is_refused(message, data):
    """Put a value of a foreign type in a random place, or take one away."""
    wire = json.loads(encode(message))
    place = data.draw(st.sampled_from(list(_places(wire))))
    parent = wire
    for key in place[:-1]:
        parent = parent[key]
    if isinstance(parent, list) and data.draw(st.booleans()) and _has_fixed_length(place, wire):
        del parent[place[-1]]
    else:
        parent[place[-1]] = {"": True}
    with pytest.raises(ValueError, match=r".+"):
        decode(json.dumps(wire).encode())


def _places(value, path=()):
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _has_fixed_length(place, wire):
    return len(place) == 1 or (wire[0] == "Submit" and place[0] == 4 and len(place) == 2)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"[1]",
        b'["Nothing"]',
        b'["SamplingParams"]',
        b'["Shutdown",1]',
        b'["Failed",1]',
        b'["Abort","r",true]',
        b'["Abort","r",1.0]',
        b'["Loading",1]',
        b'["Failed","\xff"]',
        b"[" * 100_000,
    ],
)
def test_malformed(data):
    with pytest.raises(ValueError, match=r".+"):
        decode(data)


def test_values_that_sampling_forbids_are_refused_on_the_wire():
    good = encode(Submit("r", "t", (1,), SamplingParams(temperature=0.5)))
    for bad in (b"NaN", b"Infinity", b"-1", b"1e400"):
        with pytest.raises(ValueError, match="temperature"):
            decode(good.replace(b"0.5", bad))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", 2.0),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("min_tokens", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1.0,)),
        ("seed", 2**63),
    ],
)
def test_sampling_params_name_the_bad_field(name, value):
    with pytest.raises(ValueError, match=name):
        replace(SamplingParams(), **{name: value})
