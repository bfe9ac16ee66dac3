"""How each tensor type lays out its elements: the one table that readers, quantisation and packing share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """`block_elems` consecutive elements of a row take `block_bytes` bytes."""

    name: str
    ggml_id: int
    block_elems: int
    block_bytes: int
    scale_offsets: tuple[int, ...] = ()  # where a block keeps its float16 scales and minimums, in bytes

    @property
    def is_quantized(self) -> bool:
        return bool(self.scale_offsets)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor [..., row]. Raises ValueError where a row is not a whole number of blocks."""
        row = shape[-1] if shape else 1
        if row % self.block_elems:
            raise ValueError(f"a row of {row} elements is not a multiple of {self.name}'s {self.block_elems}")
        return prod(shape) // self.block_elems * self.block_bytes


F32 = BlockFormat("F32", 0, 1, 4)
F16 = BlockFormat("F16", 1, 1, 2)
BF16 = BlockFormat("BF16", 30, 1, 2)
Q8_0 = BlockFormat("Q8_0", 8, 32, 34, scale_offsets=(0,))
Q4_0 = BlockFormat("Q4_0", 2, 32, 18, scale_offsets=(0,))
Q4_1 = BlockFormat("Q4_1", 3, 32, 20, scale_offsets=(0, 2))
Q5_0 = BlockFormat("Q5_0", 6, 32, 22, scale_offsets=(0,))
Q5_1 = BlockFormat("Q5_1", 7, 32, 24, scale_offsets=(0, 2))
Q2_K = BlockFormat("Q2_K", 10, 256, 84, scale_offsets=(80, 82))
Q3_K = BlockFormat("Q3_K", 11, 256, 110, scale_offsets=(108,))
Q4_K = BlockFormat("Q4_K", 12, 256, 144, scale_offsets=(0, 2))
Q5_K = BlockFormat("Q5_K", 13, 256, 176, scale_offsets=(0, 2))
Q6_K = BlockFormat("Q6_K", 14, 256, 210, scale_offsets=(208,))
IQ4_NL = BlockFormat("IQ4_NL", 20, 32, 18, scale_offsets=(0,))
IQ4_XS = BlockFormat("IQ4_XS", 23, 256, 136, scale_offsets=(0,))
# of safetensors alone, and turned into BF16 when it is read (fp8.py)
F8_E4M3 = BlockFormat("F8_E4M3", -1, 1, 1)

FORMATS = (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS)
FORMAT_BY_NAME = {block_format.name: block_format for block_format in FORMATS}
FORMAT_BY_GGML_ID = {block_format.ggml_id: block_format for block_format in FORMATS}

# Names of ggml's types, so that an error can say which one was met (ggml.h, enum ggml_type).
GGML_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
