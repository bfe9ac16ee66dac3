"""From settings to an engine: the model, and what drafts for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from jinn.engine.config import EngineConfig, ModelInfo
from jinn.engine.engine import Engine

if TYPE_CHECKING:
    from jinn.engine.drafting import Drafter
    from jinn.engine.runner import Runner

Progress = Callable[[int, int], None]  # bytes read, bytes in all
LoadRunner = Callable[[EngineConfig, Progress], "tuple[Runner, ModelInfo]"]

_DRAFT_CACHE_SHARE = 4  # a draft model gets one part in so many of cache_memory


def start_engine(config: EngineConfig, load_runner: LoadRunner, progress: Progress) -> Engine:
    """Load what `config` names. Raises WeightsError, ConfigError or another ValueError, one line each."""
    draft_memory = config.cache_memory // _DRAFT_CACHE_SHARE if config.speculative == "draft" else 0
    model_config = replace(config, cache_memory=config.cache_memory - draft_memory)
    runner, info = load_runner(model_config, progress)
    return Engine(runner, info, model_config, _drafter(runner, config, draft_memory, load_runner))


def _drafter(
    runner: Runner, config: EngineConfig, draft_memory: int, load_runner: LoadRunner
) -> Drafter | None:
    if config.speculative == "off":
        return None
    from jinn.engine.drafting import ModelDrafter, MtpDrafter, NgramDrafter  # few engines draft

    num_tokens = config.num_draft_tokens
    if config.speculative == "ngram":
        return NgramDrafter(num_tokens)
    if config.speculative == "mtp":
        return MtpDrafter(runner, num_tokens)
    draft_runner = _draft_runner(runner, config, draft_memory, load_runner)
    return ModelDrafter(draft_runner, num_tokens, config.max_num_batched_tokens)


def _draft_runner(runner: Runner, config: EngineConfig, draft_memory: int, load_runner: LoadRunner) -> Runner:
    """The draft model. Raises ValueError where it cannot draft for the other."""
    draft_config = replace(
        config,
        model=config.draft_model or "",  # without one, EngineConfig refuses it
        draft_model=None,
        lora_adapters={},
        speculative="off",
        cache_memory=draft_memory,
    )
    draft_runner, _ = load_runner(draft_config, lambda done, total: None)
    if draft_runner.vocab_size != runner.vocab_size:
        sizes = f"{draft_runner.vocab_size} tokens, not {runner.vocab_size}"
        raise ValueError(f"draft_model has a vocabulary of {sizes} as the model has")
    if draft_runner.num_state_slots:
        raise ValueError("draft_model has recurrent states, which cannot take a wrong draft back")
    return draft_runner
