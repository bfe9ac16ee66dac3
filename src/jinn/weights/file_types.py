"""Which type each tensor of a new file gets, when a type is wanted for the matrices."""

from __future__ import annotations

from collections.abc import Sequence

from jinn.weights.block_formats import (
    BF16,
    F16,
    F32,
    FORMAT_BY_NAME,
    Q4_0,
    Q4_1,
    Q4_K,
    Q6_K,
    Q8_0,
    BlockFormat,
)
from jinn.weights.errors import WeightsError

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q4_k", "q6_k")
FOLDER_TYPES = ("f32", "f16", "bf16")
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# general.file_type (llama.h, enum llama_ftype), which only names the file
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10}
_FILE_TYPES |= {"Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32}
_COARSE = (Q4_0, Q4_1, Q4_K)
_HEADS = ("output.weight", "token_embd.weight")
# llama.cpp computes with these in float32 and takes no other type
_FLOAT32_NAMES = ("ffn_gate_inp", "ssm_conv1d", "exp_probs_b")


def wanted_type(name: str, allowed: Sequence[str]) -> BlockFormat:
    """The type of a name in lower case. Raises WeightsError where it is none of those allowed."""
    if name not in allowed:
        raise WeightsError(f"type {name!r} is not one of {', '.join(allowed)}")
    return FORMAT_BY_NAME[name.upper()]


def gguf_type(
    name: str, shape: Sequence[int], source: BlockFormat, wanted: BlockFormat | None
) -> BlockFormat:
    """Of a tensor by GGUF's name: the wanted type, or the source's, where llama.cpp takes it.

    The embedding and the head, on which errors tell most, get six bits where the wanted type has four, and
    rows that are no whole number of blocks the next type that has smaller ones.
    """
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
        return F32
    if any(part in name for part in _FLOAT32_NAMES):
        return F32
    if wanted is None:
        return source
    candidates = (Q6_K if wanted in _COARSE and name in _HEADS else wanted, Q8_0, BF16)
    return next(candidate for candidate in candidates if shape[-1] % candidate.block_elems == 0)


def folder_type(
    num_dims: int, source: BlockFormat, wanted: BlockFormat | None, main: BlockFormat
) -> tuple[BlockFormat, bool]:
    """Of a tensor in a Hugging Face folder whose matrices have the type `main`, and whether it must be exact.

    Where it must, and its values need more bits, it becomes F32: GGUF keeps norms in F32 that were BF16.
    """
    if wanted is None and source in (F16, BF16):
        return source, False
    chosen = main if wanted is None else wanted
    return chosen, source is F32 and (num_dims < 2 or wanted is None)


def main_folder_type(largest: BlockFormat, wanted: BlockFormat | None) -> BlockFormat:
    """The type of most of a folder's bytes, of the largest tensor's type before."""
    return wanted or (BF16 if largest.is_quantized else largest)


def file_type(block_format: BlockFormat) -> int:
    """`general.file_type` of a GGUF whose matrices have this type."""
    return _FILE_TYPES[block_format.name]
