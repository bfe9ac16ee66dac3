"""`jinn generate`: one answer to one prompt, on standard output."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jinn.cli.options import (
    LoraOption,
    MaxTokensOption,
    ModelArgument,
    ThreadsOption,
    parse_adapter,
    read_text,
)
from jinn.cli.progress import progress_bar

if TYPE_CHECKING:
    from jinn.engine.messages import SamplingParams


def generate(
    model: ModelArgument = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The prompt.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file that holds the prompt.", show_default=False)
    ] = None,
    max_tokens: MaxTokensOption = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", help="Draw from the N most likely tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens that have this share.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The same seed draws the same text.", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt; use no chat template.")] = False,
    lora: LoraOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Print a model's answer, and nothing else."""
    text = _prompt(prompt, prompt_file)
    adapter, lora_adapters = parse_adapter(lora or ())
    from jinn.llm import LLM

    with progress_bar("Loading", is_bytes=True) as on_load:
        llm = LLM(model, threads=threads, lora_adapters=lora_adapters, progress=on_load)
    given = {"max_tokens": max_tokens, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling = _with_given(llm.default_sampling, temperature=temperature, **given)
    if not raw and not llm.has_chat_template:
        raise ValueError("this model has no chat template; --raw goes without")
    prompt_ids = llm.tokenize(text) if raw else llm.encode_chat([{"role": "user", "content": text}])
    for delta in llm.stream(prompt_ids, sampling, adapter=adapter):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    if sys.stdout.isatty():
        print()


def _with_given(sampling: SamplingParams, **values: Any) -> SamplingParams:
    return replace(sampling, **{name: value for name, value in values.items() if value is not None})


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give one of --prompt and --prompt-file")
    return read_text(prompt_file) if prompt_file is not None else prompt or ""
