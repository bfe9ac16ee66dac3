"""The packaged SmolLM2 on 2,000 tokens of English: how far native logits are from float32."""

from __future__ import annotations

from pydoc_data.topics import topics

import numpy as np
import pytest

from jinn.engine.config import EngineConfig
from jinn.engine.loading import load_runner
from jinn.engine.reference_runner import load_reference_runner
from jinn.text.tokenizer import Tokenizer
from jinn.weights.checkpoint import open_checkpoint

from .transformers_models import all_logits

NUM_TOKENS, CHUNK = 2048, 512
LLAMA_CPP_KL = 3.5e-3  # int8 activations, on the same file


@pytest.fixture(scope="module")
def chunks(smollm2_path):
    """Ids of Python's own documentation, in texts of CHUNK tokens."""
    with open_checkpoint(smollm2_path) as checkpoint:
        tokenizer = Tokenizer.from_gguf(checkpoint.config_source)
    text = "\n".join(
        topics[name] for name in ("assignment", "dynamic-features", "exceptions", "execmodel", "import")
    )
    ids = tokenizer.encode(text)[:NUM_TOKENS]
    assert len(ids) == NUM_TOKENS
    return [ids[start : start + CHUNK] for start in range(0, NUM_TOKENS, CHUNK)]


@pytest.fixture(scope="module")
def reference_logprobs(smollm2_path, chunks):
    runner = load(load_reference_runner, smollm2_path, activations="f32", kv_cache_dtype="f32")
    return [log_softmax(all_logits(runner, ids)) for ids in chunks]


def load(loader, path, **settings):
    config = EngineConfig(str(path), cache_memory=2**26, block_size=32, **settings)
    return loader(config, lambda loaded, total: None)[0]


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def mean_kl(reference_logprobs, runner, chunks):
    """Mean over tokens of KL(reference || runner), in nats; and how often both like the same token best."""
    divergence, agreements = 0.0, 0
    for expected, ids in zip(reference_logprobs, chunks, strict=True):
        actual = log_softmax(all_logits(runner, ids))
        divergence += float((np.exp(expected) * (expected - actual)).sum(dtype=np.float64))
        agreements += int((expected.argmax(-1) == actual.argmax(-1)).sum())
    return divergence / NUM_TOKENS, agreements / NUM_TOKENS


@pytest.mark.parametrize(
    ("activations", "kv_cache_dtype", "limit"),
    [
        ("int8", "bf16", 1.1 * LLAMA_CPP_KL),
        ("mixed", "bf16", 0.2 * LLAMA_CPP_KL),
        ("int12", "bf16", 0.03 * LLAMA_CPP_KL),
        ("f32", "f32", 1e-6),
    ],
)
def test_kl_to_float32(smollm2_path, chunks, reference_logprobs, activations, kv_cache_dtype, limit):
    runner = load(load_runner, smollm2_path, activations=activations, kv_cache_dtype=kv_cache_dtype)
    divergence, agreement = mean_kl(reference_logprobs, runner, chunks)
    print(
        f"{activations} activations, {kv_cache_dtype} cache: KL {divergence:.2e}, same best {agreement:.2%}"
    )
    assert divergence <= limit
    assert divergence >= -1e-7


def test_the_measure_finds_a_wrong_scale(smollm2_path, chunks, reference_logprobs):
    """Logits 1% too large are further away than the limit for float32."""
    logits = [expected * np.float32(1.01) for expected in reference_logprobs[:1]]

    class Scaled:
        block_size = 32

        def logits(self, batch):
            return logits[0]

    divergence, _ = mean_kl(reference_logprobs[:1], Scaled(), chunks[:1])
    assert divergence * NUM_TOKENS / CHUNK > 1e-5
