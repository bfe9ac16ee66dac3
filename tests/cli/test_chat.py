from __future__ import annotations

import os
import signal

import pytest

from jinn import LLM
from jinn.cli.chat import HELP, Conversation


@pytest.fixture
def llm(tiny_path):
    with LLM(tiny_path, cache_memory=2**20) as llm:
        yield llm
        llm._engine.check_integrity()


@pytest.fixture
def conversation(llm):
    return Conversation(llm, max_tokens=10, temperature=0.0)


def say(conversation, text):
    return "".join(conversation.say(text))


def shown(text):
    """What a terminal certainly shows of a text."""
    return "".join(c for c in text if c in "\t\n" or c.isprintable())


def test_turns_are_remembered(conversation):
    answers = [say(conversation, text) for text in ("the", "thin")]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in conversation.messages] == [
        "the",
        answers[0],
        "thin",
        answers[1],
    ]
    conversation.clear()
    assert say(conversation, "the") == answers[0]


def test_the_second_turn_reads_the_first_from_the_cache(llm, conversation):
    say(conversation, "the thin hint")
    first_prompt = llm.encode_chat(conversation.messages[:1])
    cached_before = llm._engine.stats.num_cached_tokens
    say(conversation, "then")
    assert llm._engine.stats.num_cached_tokens - cached_before >= len(first_prompt)


def test_an_answer_cut_short_is_kept_as_far_as_it_came(conversation):
    pieces = conversation.say("the thin hint")
    answer = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": answer}
    assert say(conversation, "go on")


def test_a_conversation_that_does_not_fit_stays_as_it_was(conversation):
    say(conversation, "the")
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="max_model_len of 256"):
        say(conversation, "x" * 300)
    assert conversation.messages == before


def test_a_session(run, tiny_path, conversation):
    expected = [say(conversation, "the"), say(conversation, "thin")]
    lines = "the\n\nthin\n/what\n/clear\nthe\n/exit\nnot said\n"
    result = run("chat", tiny_path, "--temperature", 0, "--max-tokens", 10, text=lines)
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [HELP, HELP]
    assert shown(result.stdout) == shown("".join(f"{text}\n" for text in [*expected, expected[0]]))


def test_an_adapter_answers(run, tiny_path, lora_path, conversation):
    arguments = ["chat", tiny_path, "--temperature", 0, "--max-tokens", 10]
    result = run(*arguments, "--lora", f"first={lora_path}", text="the\n")
    with LLM(tiny_path, cache_memory=2**20, lora_adapters={"first": lora_path}) as llm:
        adapted = say(Conversation(llm, 10, 0.0, "first"), "the")
    assert (result.exit_code, shown(result.stdout)) == (0, shown(f"{adapted}\n"))
    assert adapted != say(conversation, "the")


def test_the_end_of_input_ends_it(run, tiny_path):
    assert run("chat", tiny_path, text="").exit_code == 0


def test_too_long_a_line_is_an_error_of_that_line(run, tiny_path):
    result = run("chat", tiny_path, "--temperature", 0, "--max-tokens", 3, text="x" * 300 + "\nthe\n")
    assert result.exit_code == 0
    assert "max_model_len of 256" in result.stderr
    assert len(result.stdout.split("\n", 1)[1]) > 1


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_stops_the_answer_not_the_program(run, tiny_path, monkeypatch):
    said = []

    def interrupted_once(self, text, on_prefill=None):
        said.append(text)
        yield "half"
        if len(said) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        yield " whole"

    monkeypatch.setattr(Conversation, "say", interrupted_once)
    result = run("chat", tiny_path, text="one\ntwo\n")
    assert result.exit_code == 0
    assert said == ["one", "two"]
    assert result.stdout == "half\nhalf whole\n"


def test_a_model_cannot_steer_the_terminal(run, tiny_path, monkeypatch):
    monkeypatch.setattr(Conversation, "say", lambda *_: (part for part in ["\x1b[31m", "a\tb\n\x07\x9bc\r"]))
    assert run("chat", tiny_path, text="one\n").stdout == "[31ma\tb\nc\n"
