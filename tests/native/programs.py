"""Runs single native ops. Inputs come from embedding tables; every buffer is NaN before its op writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from jinn import _native
from jinn.ops.native import (
    Instruction,
    NativeOps,
    Recording,
    SymbolicValue,
    batch_arrays,
    compile_program,
    fuse,
)
from jinn.ops.protocol import Batch, Context
from jinn.weights.block_formats import FORMAT_BY_NAME
from jinn.weights.quantize import QUANTIZABLE, quantize

ISAS = _native.isa_names()
FORMATS = tuple(FORMAT_BY_NAME)
LARGEST_CODES = {  # the largest value of a block whose float16 scale is 1
    "Q8_0": 127, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31,
    "Q2_K": 45, "Q3_K": 128, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4096, "IQ4_NL": 127, "IQ4_XS": 4064,
}  # fmt: skip
INTEGER_FORMATS = tuple(name for name, block_format in FORMAT_BY_NAME.items() if block_format.is_quantized)
POOLS = {num_threads: _native.ThreadPool(num_threads) for num_threads in (1, 2)}

Build = Callable[..., Sequence[SymbolicValue]]
"""Takes NativeOps and the inputs; returns values that lie in one buffer."""


def pack(
    values: np.ndarray, format_name: str = "F32", row_order: np.ndarray | None = None
) -> _native.PackedTensor:
    """float32 [rows, cols] as the kernels read it; other values where nothing quantises to the format."""
    return _native.pack(POOLS[1], file_bytes(values, format_name), format_name, *values.shape, row_order)


def file_bytes(values: np.ndarray, format_name: str) -> np.ndarray:
    """The values as a file holds them; others where nothing quantises to the format."""
    if format_name == "F32":
        return np.ascontiguousarray(values, np.float32).view(np.uint8).reshape(-1)
    if format_name in QUANTIZABLE:
        return quantize(values, FORMAT_BY_NAME[format_name])
    return random_blocks(format_name, values.shape, float(np.abs(values).max()))


def whole_blocks(format_name: str, cols: int) -> int:
    """`cols`, or the next width that the format can hold."""
    block_elems = FORMAT_BY_NAME[format_name].block_elems
    return -(-cols // block_elems) * block_elems


def random_blocks(format_name: str, shape: tuple[int, int], largest: float) -> np.ndarray:
    """Bytes of every pattern of codes and sub-scales, with values up to about `largest`."""
    block_format = FORMAT_BY_NAME[format_name]
    rng = np.random.default_rng(shape)
    num_blocks = block_format.nbytes(shape) // block_format.block_bytes
    blocks = rng.integers(0, 256, (num_blocks, block_format.block_bytes), np.uint8)
    for offset in block_format.scale_offsets:
        scales = rng.uniform(-1, 1, (num_blocks, 1)) * largest / LARGEST_CODES[format_name]
        blocks[:, offset : offset + 2] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(-1)


def parameter(weight: Any, bias: np.ndarray | None = None) -> SimpleNamespace:
    return SimpleNamespace(weight=weight) if bias is None else SimpleNamespace(weight=weight, bias=bias)


def columns(value: SymbolicValue, first_col: int, cols: int) -> SymbolicValue:
    """A strided view of a value."""
    return SymbolicValue(value.buffer, cols, value.first_col + first_col)


def one_sequence(token_ids: Sequence[int], context_len: int = 0, block_size: int = 16) -> Batch:
    """A batch of one sequence whose context ends at `context_len` (0: with its tokens); all rows wanted."""
    return packed_sequences([(token_ids, context_len or len(token_ids))], block_size)


def packed_sequences(sequences: Sequence[tuple[Sequence[int], int]], block_size: int = 16) -> Batch:
    """A batch of (token_ids, context_len) pairs; sequence s holds the blocks s, s + num_seqs, ..."""
    lengths = [len(token_ids) for token_ids, _ in sequences]
    contexts = np.array([context_len for _, context_len in sequences], np.int32)
    max_blocks = -(-int(contexts.max()) // block_size)
    blocks = np.arange(max_blocks * len(sequences), dtype=np.int32).reshape(max_blocks, len(sequences)).T
    positions = [np.arange(end - n, end, dtype=np.int32) for n, end in zip(lengths, contexts, strict=True)]
    return Batch(
        np.concatenate([np.asarray(token_ids, np.int32) for token_ids, _ in sequences]),
        np.concatenate(positions),
        np.cumsum([0, *lengths], dtype=np.int32),
        contexts,
        np.ascontiguousarray(blocks),
        np.arange(sum(lengths), dtype=np.int32),
    )


class OpProgram:
    """A few ops as a program. Token `i` reads row `i` of each input, float32 [rows, cols]."""

    def __init__(
        self,
        build: Build,
        *inputs: np.ndarray,
        isa: str = "",
        num_threads: int = 1,
        activations: str = "int8",
        is_fused: bool = False,
        is_poisoned: bool = True,
    ) -> None:
        self.num_rows = len(inputs[0])
        self._is_poisoned = is_poisoned
        ops = NativeOps(activations)
        values = [ops.embed(parameter(pack(table)), Context()) for table in inputs]
        self._outputs = build(ops, *values)
        buffer = self._outputs[0].buffer
        recording = Recording(ops.instructions, SymbolicValue(buffer, buffer.row_bytes // 4))
        if is_fused:
            recording = fuse(recording)
        if is_poisoned:
            recording = replace(
                recording, instructions=list(_poisoned(recording.instructions, self.num_rows))
            )
        self._program = compile_program(recording, POOLS[num_threads], _native.choose_kernels(isa))

    def run(
        self,
        batch: Batch,
        cache: _native.KVCache | None = None,
        states: _native.StateCache | None = None,
    ) -> list[np.ndarray]:
        """The outputs [rows, cols] of a batch. Raises AssertionError where an op wrote beside its columns."""
        buffer = _native.run(*self.arguments(batch, cache, states)).copy()
        is_output = np.zeros(buffer.shape[1], bool)
        for value in self._outputs:
            is_output[value.first_col : value.first_col + value.cols] = True
        if self._is_poisoned:
            assert np.isnan(buffer[:, ~is_output]).all(), "an op wrote beside its columns"
        return [buffer[:, value.first_col : value.first_col + value.cols] for value in self._outputs]

    def arguments(
        self,
        batch: Batch,
        cache: _native.KVCache | None = None,
        states: _native.StateCache | None = None,
    ) -> tuple[Any, ...]:
        """What `_native.run` and `_native.profile` take."""
        if cache is None:
            cache = _native.KVCache([(1, 4, 4)], "f32", int(batch.block_tables.max()) + 1, 16)
        return self._program, cache, states, self.num_rows, batch_arrays(batch)

    def run_rows(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The outputs of these input rows, at positions 0, 1, ..."""
        return self.run(one_sequence(rows))


def run_op(build: Build, *inputs: np.ndarray, **settings: Any) -> list[np.ndarray]:
    """The outputs for all rows of the inputs, once."""
    return OpProgram(build, *inputs, **settings).run_rows(range(len(inputs[0])))


def _poisoned(instructions: Sequence[Instruction], num_rows: int) -> Iterator[Instruction]:
    """The instructions, and before each buffer's first use one that fills it with NaN."""
    written = set()
    for instruction in instructions:
        for buffer in {value.buffer for value in instruction.outputs} - written:
            written.add(buffer)
            nans = np.full((num_rows, buffer.row_bytes // 4), np.nan, np.float32)
            whole = SymbolicValue(buffer, nans.shape[1])
            yield Instruction("embed", (), (whole,), {"table": pack(nans)})
        yield instruction


def pack_experts(values: np.ndarray, format_name: str = "F32") -> _native.PackedExperts:
    """float32 [experts, rows, cols] as the kernels read it."""
    sources = [file_bytes(matrix, format_name) for matrix in values]
    return _native.pack_experts(POOLS[1], sources, format_name, *values.shape[1:])
