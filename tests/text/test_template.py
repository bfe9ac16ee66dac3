from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import official
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jinn.text.template import ChatTemplate, TemplateError, encode_chat
from jinn.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d <b>", "parameters": {"type": "object"}},
}


@pytest.fixture(scope="module")
def reference_qwen3() -> Any:
    return AutoTokenizer.from_pretrained(official.official_folder("qwen3"))


@pytest.fixture(scope="module")
def reference_smollm2() -> Any:
    metadata = official.smollm2_metadata()
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {text: i for i, text in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]
        )
    )
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    library.add_special_tokens(tokens[:17])
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token="<|im_start|>",  # noqa: S106
        eos_token="<|im_end|>",  # noqa: S106
        chat_template=metadata["tokenizer.chat_template"],
    )


def random_content(rng: random.Random) -> str:
    texts = (
        "Hello",
        "\n\nHello",
        "  two spaces",
        "tabs\tand\n",
        "x<y>z",
        "{{ not jinja }}",
        "漢字 👍🏽",
        "",
        "a" * 300,
    )
    text = rng.choice(texts) + official.random_text(rng, ["|", "<", ">"])
    return official.LOSSY.sub("", text).replace("<|im_", "").replace("think", "thank")


def random_conversation(rng: random.Random, *, with_tools: bool) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": random_content(rng)})
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": random_content(rng)})
        if with_tools and rng.random() < 0.4:
            arguments = rng.choice(('{"a": 1}', {"a": ["é", None, True, 1.5]}))
            call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
            content = rng.choice(("", "I look."))
            messages.append(
                {"role": "assistant", "content": content, "tool_calls": [call] * rng.randint(1, 2)}
            )
            messages += [{"role": "tool", "content": random_content(rng)}] * rng.randint(1, 2)
        thought = f"<think>\n{random_content(rng)}\n</think>\n\n" if with_tools and rng.random() < 0.4 else ""
        reply = {"role": "assistant", "content": thought + random_content(rng)}
        if with_tools and rng.random() < 0.3:
            reply[rng.choice(("reasoning_content", "reasoning"))] = random_content(rng)
        messages.append(reply)
    if rng.random() < 0.7:
        messages.append({"role": "user", "content": random_content(rng)})
    conversation: dict[str, Any] = {"messages": messages, "add_generation_prompt": rng.random() < 0.7}
    if with_tools:
        conversation["tools"] = rng.choice((None, [], [TOOL, TOOL]))
        if rng.random() < 0.5:
            conversation["enable_thinking"] = rng.random() < 0.5
    return conversation


def assert_equal_to(
    reference: Any, tokenizer: Tokenizer, template: ChatTemplate, conversation: dict[str, Any]
) -> None:
    messages = conversation.pop("messages")
    expected = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **conversation)
    assert encode_chat(tokenizer, template, messages, **conversation) == expected


@pytest.mark.parametrize("count", [200, pytest.param(2_000, marks=pytest.mark.soak)])
def test_ordinary_chats_equal_transformers_on_qwen3(reference_qwen3: Any, count: int) -> None:
    template, rng = ChatTemplate.from_folder(official.official_folder("qwen3")), random.Random(5)
    assert template is not None
    for _ in range(count):
        conversation = random_conversation(rng, with_tools=True)
        assert_equal_to(reference_qwen3, official.official("qwen3"), template, conversation)


@pytest.mark.parametrize("count", [200, pytest.param(2_000, marks=pytest.mark.soak)])
def test_ordinary_chats_equal_transformers_on_smollm2(reference_smollm2: Any, count: int) -> None:
    template, rng = ChatTemplate.from_gguf(official.smollm2_metadata()), random.Random(6)
    assert template is not None
    for _ in range(count):
        conversation = random_conversation(rng, with_tools=False)
        assert_equal_to(reference_smollm2, official.smollm2(), template, conversation)


SNIPPETS = (Path(__file__).parent / "snippets.txt").read_text().removesuffix("\n").split("\n---\n")


@pytest.mark.parametrize("source", SNIPPETS)
def test_rendering_equals_transformers(reference_smollm2: Any, source: str) -> None:
    messages = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "<b>\u00e9"}]
    expected = reference_smollm2.apply_chat_template(
        messages, tools=[TOOL], chat_template=source, tokenize=False
    )
    rendered = ChatTemplate(source).render(
        messages,
        tools=[TOOL],
        add_generation_prompt=False,
        bos_token="<|im_start|>",  # noqa: S106
        eos_token="<|im_end|>",  # noqa: S106
    )
    assert rendered == expected


def test_strftime_now_gives_the_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y')|int > 2024 }}").render(USER) == "True"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template, line 1: roles must alternate"),
        ("a\n\n{{ messages[0].tools.x }}", "chat template, line 3: 'dict object' has no attribute 'tools'"),
        ("{{ messages[0].content + 1 }}", "chat template, line 1: can only concatenate str"),
        ("{{ 1 // 0 }}", "chat template, line 1: integer division or modulo by zero"),
    ],
)
def test_a_failure_names_the_line_and_the_reason(source: str, reason: str) -> None:
    with pytest.raises(TemplateError) as raised:
        ChatTemplate(source).render(USER)
    assert str(raised.value).startswith(reason)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("a\n{% for %}", "chat template, line 2:"),
        ("{{ 1|nothing }}", "No filter named 'nothing'"),
        ("{% for i in x %}" * 30 + "{% endfor %}" * 30, "does not compile"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nests too deeply"),
        ("x" * 300_000, "has 300000 characters, more than 262144"),
    ],
)
def test_a_template_that_does_not_compile_is_refused(source: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        ChatTemplate(source)


def test_a_long_reason_is_cut() -> None:
    with pytest.raises(TemplateError) as raised:
        ChatTemplate("{{ raise_exception('x' * 5000) }}").render(USER)
    assert len(str(raised.value)) < 400


def test_without_a_template_chat_says_what_to_do() -> None:
    with pytest.raises(TemplateError, match="--chat-template"):
        encode_chat(official.smollm2(), None, USER)


def test_parts_are_one_text() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    ids = encode_chat(official.smollm2(), template, [{"role": "user", "content": parts}])
    assert ids == official.smollm2().encode("a b")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is not an object with a role"),
        ([{"content": "hi"}], r"messages\[0\] is not an object with a role"),
        (
            [*USER, {"role": "user", "content": 5}],
            r"messages\[1\]\.content must be a string or a list of parts",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            r"messages\[0\]\.content\[1\]\.type 'image_url' is not supported; supported: 'text'",
        ),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\]\.content\[0\]\.type None is not supported"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"messages\[0\]\.content\[0\]\.text must be a string",
        ),
        ([{"role": "user", "content": "\udfff"}], "lone surrogate"),
    ],
)
def test_a_malformed_message_is_named(messages: Any, reason: str) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match=reason):
        encode_chat(official.smollm2(), template, messages)


def test_fields_that_nest_too_deeply_are_refused() -> None:
    nested: Any = "x"
    for _ in range(2_000):
        nested = [nested]
    with pytest.raises(ValueError, match="nest too deeply"):
        encode_chat(
            official.smollm2(), ChatTemplate("{{ tools|length }}"), USER, tools=[{"function": nested}]
        )


def test_null_fields_are_as_if_absent() -> None:
    template = ChatTemplate("{{ messages[0].content is defined }}{{ messages[0].name is defined }}")
    ids = encode_chat(official.smollm2(), template, [{"role": "user", "content": None, "name": None}])
    assert official.smollm2().decode(ids) == "FalseFalse"


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_a_call_without_content_is_rendered(name: str) -> None:
    """The one template reads content as text, the other asks whether it is null."""
    tokenizer, template = official.official(name), ChatTemplate.from_folder(official.official_folder(name))
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    ids = encode_chat(tokenizer, template, [*USER, calling, {"role": "tool", "content": "done"}])
    text = tokenizer.decode(ids, skip_special=False)
    assert "{}" in text
    assert "None" not in text


def test_templates_in_a_gguf() -> None:
    key = "tokenizer.chat_template"
    assert ChatTemplate.from_gguf({}) is None
    both = ChatTemplate.from_gguf({key: "plain", f"{key}.tool_use": "tools", f"{key}.rag": "documents"})
    assert both is not None
    assert (both.render(USER), both.render(USER, tools=[TOOL])) == ("plain", "tools")


def test_templates_in_a_folder(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    for source, expected in (
        (None, None),
        ("one", "one"),
        ([{"name": "default", "template": "two"}, {"name": "tool_use", "template": "x"}], "two"),
    ):
        config.write_text(json.dumps({"chat_template": source} if source else {}))
        template = ChatTemplate.from_folder(tmp_path)
        assert (template and template.render(USER)) == expected
    (tmp_path / "chat_template.jinja").write_text("file")
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render(USER) == "file"


def test_named_templates_need_a_default() -> None:
    with pytest.raises(TemplateError, match=r"no chat template is named 'default', only \['rag'\]"):
        ChatTemplate({"rag": "x"})


def test_chats_take_no_bos_but_the_template_s() -> None:
    tokenizer = official.official("deepseek")
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert encode_chat(tokenizer, template, USER) == [0, *tokenizer.encode("hi", add_bos=False), 1]
    assert encode_chat(tokenizer, ChatTemplate("hi"), USER) == tokenizer.encode("hi", add_bos=False)
