"""Finds NaN and infinity in a tensor's bytes: among its values, or the block scales of a quantised format.

One of them would turn every activation it meets into NaN.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jinn.weights.block_formats import BF16, F16, F32
from jinn.weights.errors import WeightsError, quoted
from jinn.weights.tensors import TensorInfo

_CHUNK_BLOCKS = 1 << 18  # bounds the scan's memory
_F16_EXPONENT = 0x7C00
_EXPONENTS: dict[str, tuple[str, int]] = {
    F32.name: ("<u4", 0x7F800000),
    F16.name: ("<u2", _F16_EXPONENT),
    BF16.name: ("<u2", 0x7F80),
}


def check_finite(tensor: TensorInfo, data: npt.NDArray[np.uint8]) -> None:
    """Raise WeightsError naming the tensor and the element's row-major index where `data` holds one."""
    block_format = tensor.format
    blocks = np.ascontiguousarray(data).reshape(-1, block_format.block_bytes)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        chunk = blocks[start : start + _CHUNK_BLOCKS]
        if block_format.is_quantized:
            for offset in block_format.scale_offsets:
                scales = _uint16_column(chunk, offset)
                _check(tensor, scales & _F16_EXPONENT == _F16_EXPONENT, start)
        else:
            dtype, exponent = _EXPONENTS[block_format.name]
            _check(tensor, chunk.view(dtype)[:, 0] & exponent == exponent, start)


def _uint16_column(blocks: npt.NDArray[np.uint8], offset: int) -> npt.NDArray[np.uint16]:
    return np.ndarray((len(blocks),), "<u2", blocks, offset, (blocks.strides[0],))


def _check(tensor: TensorInfo, is_bad: npt.NDArray[np.bool_], start: int) -> None:
    if is_bad.any():
        element = (start + int(is_bad.argmax())) * tensor.format.block_elems
        kind = "block scale" if tensor.format.is_quantized else "value"
        raise WeightsError(
            f"tensor {quoted(tensor.name)}: the {kind} at element {element} is NaN or infinite"
        )
