"""8-bit floats with a scale for each block of 128 by 128, as DeepSeek-V3 is released, made BF16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jinn.weights.block_formats import BF16, F8_E4M3
from jinn.weights.errors import WeightsError, quoted
from jinn.weights.quantize import dequantize, quantize
from jinn.weights.safetensors import SafetensorsFolder
from jinn.weights.tensors import TensorInfo

SCALE_SUFFIX = "_scale_inv"  # of the scales' name; despite it they are multiplied
BLOCK_SIZE = 128

ByteArray = npt.NDArray[np.uint8]


def _e4m3_values() -> npt.NDArray[np.float32]:
    """The float32 of each byte: a sign, 4 bits of exponent, 3 of mantissa; NaN at 0x7F, no infinity."""
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    magnitudes = np.where(
        exponents == 0, mantissas * 2.0**-9, (8 + mantissas) * 2.0 ** (exponents.astype(np.float64) - 10)
    )
    magnitudes[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes & 0x80, -magnitudes, magnitudes).astype(np.float32)


E4M3_VALUES = _e4m3_values()


def dequantize_fp8(data: ByteArray, scales: npt.NDArray[np.float32], shape: Sequence[int]) -> ByteArray:
    """The bytes of a BF16 matrix: each byte's value times its block's scale, rounded once.

    Raises ValueError where a value is not finite.
    """
    rows, columns = shape
    codes, result = data.reshape(rows, columns), np.empty((rows, 2 * columns), np.uint8)
    for block, row_scales in enumerate(scales):
        part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        values = E4M3_VALUES[codes[part]]
        values *= np.repeat(row_scales, BLOCK_SIZE)[:columns]
        result[part] = quantize(values, BF16).reshape(len(values), -1)
    return result.reshape(-1)


def open_bf16(folder: SafetensorsFolder) -> SafetensorsFolder | BF16Folder:
    """The folder, with its 8-bit floats as BF16 where it has any. Raises WeightsError where scales lack."""
    if all(info.format is not F8_E4M3 for info in folder.tensors.values()):
        return folder
    try:
        return BF16Folder(folder)
    except BaseException:
        folder.close()
        raise


class BF16Folder:
    """A folder whose 8-bit floats look like BF16. A tensor is kept in memory from `data` until `release`."""

    def __init__(self, folder: SafetensorsFolder) -> None:
        self._folder = folder
        self._held: dict[str, ByteArray] = {}
        small = [info for info in folder.tensors.values() if info.format is F8_E4M3]
        for info in small:
            self._check(info)
        scales = {info.name + SCALE_SUFFIX for info in small}
        self.tensors = {name: info for name, info in folder.tensors.items() if name not in scales}
        for info in small:
            self.tensors[info.name] = replace(info, format=BF16, nbytes=BF16.nbytes(info.shape))

    def _check(self, info: TensorInfo) -> None:
        where = f"{self._folder.path}: tensor {quoted(info.name)} is F8_E4M3 {list(info.shape)}"
        scales = self._folder.tensors.get(info.name + SCALE_SUFFIX)
        expected = tuple(-(-size // BLOCK_SIZE) for size in info.shape)
        if len(info.shape) != 2 or scales is None:
            raise WeightsError(f"{where}; supported are matrices with scales in NAME{SCALE_SUFFIX}")
        if scales.shape != expected or scales.format is F8_E4M3:
            raise WeightsError(
                f"{where}, whose scales must be floats {list(expected)}, not {list(scales.shape)}"
            )

    @property
    def files(self) -> list[Path]:
        """The folder's."""
        return self._folder.files

    def data(self, name: str) -> ByteArray:
        """The tensor's bytes [nbytes], read-only. Raises KeyError for an unknown name, ValueError for NaN."""
        info = self.tensors[name]
        if self._folder.tensors[name].format is not F8_E4M3:
            return self._folder.data(name)
        if name not in self._held:
            scales = self._folder.tensors[name + SCALE_SUFFIX]
            values = dequantize(self._folder.data(scales.name), scales.format, scales.shape)
            try:
                self._held[name] = dequantize_fp8(self._folder.data(name), values, info.shape)
            except ValueError as error:
                raise WeightsError(f"{self._folder.path}: tensor {quoted(name)}: {error}") from None
            self._held[name].flags.writeable = False
        return self._held[name]

    def release(self, name: str) -> None:
        """Drop the tensor from memory; reading it again is allowed."""
        self._held.pop(name, None)
        self._folder.release(name)

    def close(self) -> None:
        """Close the files; views that were handed out stay valid."""
        self._folder.close()
