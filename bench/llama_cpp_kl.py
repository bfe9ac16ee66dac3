"""Compares jinn's logits with llama.cpp's, on files that jinn writes: every family, and every block type.

    python bench/llama_cpp_kl.py --llama-cpp DIR     # the folder with llama-debug and llama-quantize

Models are random, with a final norm scaled up so that probabilities are as uneven as a trained model's. A
family is written as a Hugging Face folder and converted to GGUF. Block types are compared on the shape of
Qwen3-0.6B: jinn reads the blocks, and llama.cpp the same values in F32, since its own kernels for blocks
round activations to 8 bits; what that makes of the very same file is printed beside, and not limited. Ends
with status 1 where a mean KL divergence exceeds the limit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jinn.engine.config import EngineConfig
from jinn.engine.loading import load_runner
from jinn.models.presets import preset_config
from jinn.ops.protocol import Batch
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.convert import convert
from jinn.weights.random_model import write_random

FloatArray = npt.NDArray[np.floating[Any]]

LIMIT = 1e-3
SHARPNESS = 4.0  # of the final norm: the logits' standard deviation is about this
PROMPTS = ("abc", "the quick brown fox", "one two three four five six seven " * 8, "2026, über " * 16)
SETTINGS = ("-t", "2", "-c", "512", "--no-repack", "-fa", "off", "-ctk", "f32", "-ctv", "f32")
BLOCK_SIZE = 16

NARROW: dict[str, int | None] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "head_dim": 64,
}
NARROW |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1024, "pad_token_id": None}
EXPERTS = {"num_experts": 16, "shared_expert_intermediate_size": 256}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 128, "num_key_value_heads": 8, "n_routed_experts": 64}
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("SmolLM2-360M", 2, {}),
    "qwen3": ("Qwen3-8B", 2, {}),
    "qwen3moe": ("Qwen3-30B-A3B", 2, EXPERTS),
    "qwen3next": (
        "Qwen3-Next-80B-A3B",
        4,
        {**EXPERTS, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    ),
    "qwen35": ("Qwen3.5-4B", 4, {"linear_num_key_heads": 4, "linear_num_value_heads": 12}),
    "qwen35moe": ("Qwen3.5-35B-A3B", 4, {**EXPERTS, "linear_num_key_heads": 4, "linear_num_value_heads": 8}),
    "deepseek2": ("DeepSeek-V3", 5, LATENT),
}
OWN_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "F32", "BF16")
THEIR_TYPES = ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "IQ4_XS")  # that llama-quantize must make


@dataclass(frozen=True, slots=True)
class Row:
    """Of the table: mean KL divergences, the second where llama.cpp reads the very same file."""

    case: str
    divergence: float
    same_file: float | None


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's programs in a folder."""

    folder: Path

    def run(self, program: str, *arguments: str | Path) -> None:
        """Raises subprocess.CalledProcessError, with what it said."""
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.folder)}
        command = [self.folder / program, *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment)

    def logits(self, model: Path, prompt: str, folder: Path) -> tuple[list[int], FloatArray]:
        """The prompt's token ids, and the logits after the last."""
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        options = ("-p", prompt, "--save-logits", "--logits-output-dir", folder, *SETTINGS)
        self.run("llama-debug", "-m", model, *options)
        (tokens,) = folder.glob("*-tokens.bin")
        values = np.fromfile(folder / f"llamacpp-{model.stem}.bin", np.float32)
        return np.fromfile(tokens, np.int32).tolist(), values


def main() -> int:
    """Print the table; the exit status."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        peer, work = LlamaCpp(options.llama_cpp), Path(folder)
        rows = []
        print(f"{'case':<22}  {'mean KL':>9}  {'same file':>9}")
        for row in chain(compare_families(peer, work), compare_types(peer, work, options)):
            rows.append(row)
            beside = "" if row.same_file is None else f"{row.same_file:9.1e}"
            verdict = "" if row.divergence <= LIMIT else f"  above {LIMIT:g}"
            print(f"{row.case:<22}  {row.divergence:9.1e}  {beside:>9}{verdict}", flush=True)
    failed = [row.case for row in rows if not row.divergence <= LIMIT]
    print(f"{len(rows) - len(failed)} of {len(rows)} within {LIMIT:g}")
    return 1 if failed else 0


def compare_families(peer: LlamaCpp, work: Path) -> Iterator[Row]:
    """Each family in F32 and BF16."""
    for architecture, (shape, num_layers, changes) in FAMILIES.items():
        config = preset_config(shape, num_layers)
        narrow = {name: value for name, value in {**NARROW, **changes}.items() if name in config}
        write_random(shape, {**config, **narrow}, work / "hf", "f32", overwrite=True)
        for type_name in ("f32", "bf16"):
            path = work / "model.gguf"
            convert(work / "hf", path, type_name, overwrite=True)
            sharpen(path)
            yield Row(f"{architecture} {type_name.upper()}", divergence(peer, work, path, path), None)


def compare_types(peer: LlamaCpp, work: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Each block type on the shape of Qwen3-0.6B."""
    source, path, values = work / "source.gguf", work / "model.gguf", work / "values.gguf"
    config = {**preset_config("Qwen3-0.6B", options.layers), "vocab_size": options.vocab_size}
    write_random("Qwen3-0.6B", {**config, "pad_token_id": None}, source, "f32")
    sharpen(source)
    for name in (*OWN_TYPES, *THEIR_TYPES):
        path.unlink(missing_ok=True)
        if name in OWN_TYPES:
            convert(source, path, name.lower(), num_threads=2)
        else:
            peer.run("llama-quantize", "--pure", source, path, name)
        convert(path, values, "f32", overwrite=True, num_threads=2)
        same_file = None if name in ("F32", "BF16") else divergence(peer, work, path, path)
        yield Row(f"Qwen3-0.6B {name}", divergence(peer, work, values, path), same_file)


def sharpen(path: Path) -> None:
    """Scale a GGUF's final norm up, in place."""
    with open_checkpoint(path) as checkpoint:
        info = checkpoint.tensors["output_norm.weight"]
    weights = np.memmap(path, np.float32, "r+", info.offset, info.shape)
    weights *= SHARPNESS
    weights.flush()


def divergence(peer: LlamaCpp, work: Path, theirs: Path, ours: Path) -> float:
    """The mean over prompts of KL(llama.cpp on one file, jinn on another)."""
    settings = {"activations": "f32", "kv_cache_dtype": "f32", "num_threads": 2, "cache_memory": 2**26}
    runner, _ = load_runner(
        EngineConfig(str(ours), block_size=BLOCK_SIZE, **settings), lambda done, total: None
    )
    divergences = []
    for prompt in PROMPTS:
        ids, logits = peer.logits(theirs, prompt, work / "logits")
        expected, actual = log_softmax(logits), log_softmax(runner.logits(batch_of(ids))[-1])
        divergences.append(float((np.exp(expected) * (expected - actual)).sum()))
    return float(np.mean(divergences))


def batch_of(ids: list[int]) -> Batch:
    """One sequence in the cache's first blocks, logits of its last token."""
    length = len(ids)
    return Batch(
        token_ids=np.array(ids, np.int32),
        positions=np.arange(length, dtype=np.int32),
        query_start=np.array([0, length], np.int32),
        context_lens=np.array([length], np.int32),
        block_tables=np.arange(-(-length // BLOCK_SIZE), dtype=np.int32)[None],
        logit_rows=np.array([length - 1], np.int32),
        state_slots=np.zeros(1, np.int32),
        num_drafts=np.zeros(1, np.int32),
        num_accepted=np.zeros(1, np.int32),
    )


def log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    shifted: npt.NDArray[np.float64] = logits.astype(np.float64) - float(logits.max())
    return shifted - float(np.log(np.exp(shifted).sum()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    folder = os.environ.get("LLAMA_CPP")
    parser.add_argument("--llama-cpp", type=Path, default=folder, required=not folder, metavar="DIR")
    parser.add_argument("--layers", type=int, default=2, help="of the shape for block types (default 2)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the same (default 8192)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
