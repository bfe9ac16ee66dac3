"""llama.cpp's logits of the same GGUF file, where its `llama-debug` is on the path."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from jinn.engine.config import EngineConfig
from jinn.engine.loading import load_runner

from .gguf_models import gguf_of
from .transformers_models import BLOCK_SIZE, VARIANTS, all_logits, random_model

LLAMA_DEBUG = shutil.which("llama-debug")
PROMPT = " ".join(["the thin hint of it"] * 12)
SETTINGS = ("-t", "1", "-c", "256", "--no-repack", "-fa", "off", "-ctk", "f32", "-ctv", "f32")
MAX_KL = 1e-3

pytestmark = pytest.mark.skipif(LLAMA_DEBUG is None, reason="llama-debug is not on the path")


def llama_cpp(path, folder):
    """The prompt's ids, and the logits after its last token."""
    command = [
        LLAMA_DEBUG,
        "-m",
        path,
        "-p",
        PROMPT,
        "--save-logits",
        "--logits-output-dir",
        folder,
        *SETTINGS,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)  # noqa: S603
    (tokens,) = folder.glob("*-tokens.bin")
    ids = np.fromfile(tokens, np.int32).tolist()
    return ids, np.fromfile(folder / f"llamacpp-{path.stem}.bin", np.float32)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.endswith("for llama.cpp")])
@pytest.mark.parametrize("format_name", ["F32", "BF16"])
def test_logits_are_those_of_llama_cpp(tmp_path, variant, format_name):
    random_model(variant).save_pretrained(tmp_path / "hf")
    path = gguf_of(tmp_path / "hf", tmp_path / "model.gguf", format_name)
    ids, theirs = llama_cpp(path, tmp_path / "logits")
    assert len(ids) > 128
    settings = {"activations": "f32", "kv_cache_dtype": "f32", "num_threads": 1, "cache_memory": 2**22}
    config = EngineConfig(str(path), block_size=BLOCK_SIZE, **settings)
    ours = all_logits(load_runner(config, lambda loaded, total: None)[0], ids)[-1]
    expected, actual = log_softmax(theirs), log_softmax(ours)
    divergence = float((np.exp(expected) * (expected - actual)).sum())
    print(f"{variant} {format_name}: largest error {np.abs(ours - theirs).max():.1e}, KL {divergence:.1e}")
    assert abs(divergence) <= MAX_KL
    # llama.cpp norms keys and queries of a DeltaNet with another eps
    tolerance = 5e-4 if variant.startswith(("qwen3_next", "qwen3_5")) else 1e-4
    assert format_name != "F32" or np.abs(ours - theirs).max() <= tolerance
