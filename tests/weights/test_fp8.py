"""8-bit floats with block scales, against torch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.convert import convert
from jinn.weights.errors import WeightsError
from jinn.weights.fp8 import E4M3_VALUES
from models.transformers_models import random_ids, random_model, transformers_logits

SHAPES = [(1, 1), (128, 128), (129, 130), (300, 64)]


def test_every_byte_is_torchs_value():
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3_VALUES.view(np.uint32)[:0x7F], expected.view(np.uint32)[:0x7F])
    assert np.array_equal(E4M3_VALUES[0x80:0xFF], expected[0x80:0xFF])
    assert np.isnan(E4M3_VALUES[[0x7F, 0xFF]]).all()


def quantized(weight):
    """A matrix as 8-bit floats and its scales, made as DeepSeek's are: the largest of a block becomes 448."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(rows, 128, columns, 128)
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448
    codes = (blocks / scales[:, None, :, None]).reshape(padded.shape).to(torch.float8_e4m3fn)
    return codes[: weight.shape[0], : weight.shape[1]].contiguous(), scales


def dequantized(codes, scales):
    repeated = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (codes.float() * repeated[: codes.shape[0], : codes.shape[1]]).to(torch.bfloat16)


def write_folder(path, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_torchs(tmp_path, shape):
    codes, scales = quantized(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    tensors = {"w.weight": codes, "w.weight_scale_inv": scales, "norm.weight": torch.ones(4)}
    with open_checkpoint(write_folder(tmp_path / "m", tensors)) as checkpoint:
        assert set(checkpoint.tensors) == {"w.weight", "norm.weight"}
        info = checkpoint.tensors["w.weight"]
        assert (info.format.name, info.shape, info.nbytes) == ("BF16", shape, 2 * codes.numel())
        expected = dequantized(codes, scales).view(torch.uint8).numpy().tobytes()
        for _ in range(2):
            assert bytes(checkpoint.data("w.weight")) == expected
            checkpoint.release("w.weight")
        assert bytes(checkpoint.data("norm.weight")) == torch.ones(4).numpy().tobytes()


def test_a_deepseek_checkpoint(tmp_path):
    """Linears but the router in 8 bits: the same model as their values in BF16, here and in transformers."""
    model = random_model("deepseek_v3 for llama.cpp").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    tensors, small = load_file(tmp_path / "plain" / "model.safetensors"), {}
    for name, weight in tensors.items():
        if weight.ndim == 2 and "proj" in name:
            small[name], small[f"{name}_scale_inv"] = quantized(weight.float())
            tensors[name] = dequantized(small[name], small[f"{name}_scale_inv"])
        else:
            small[name] = weight
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = write_folder(tmp_path / "small", small)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "back")
    ids = random_ids(20)
    expected = transformers_logits(tmp_path / "plain", ids)
    assert np.array_equal(transformers_logits(tmp_path / "back", ids), expected)
    convert(folder, tmp_path / "a.gguf")
    convert(tmp_path / "plain", tmp_path / "b.gguf")
    with open_checkpoint(tmp_path / "a.gguf") as a, open_checkpoint(tmp_path / "b.gguf") as b:
        assert all(np.array_equal(a.data(name), b.data(name)) for name in b.tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"w.weight_scale_inv": None},
            r"'w.weight' is F8_E4M3 \[200, 64\]; supported are matrices with scales",
        ),
        ({"w.weight_scale_inv": torch.ones(1, 1)}, r"must be floats \[2, 1\], not \[1, 1\]"),
        ({"v": torch.zeros(3).to(torch.float8_e4m3fn)}, r"'v' is F8_E4M3 \[3\]; supported are matrices"),
    ],
)
def test_bad_scales_are_refused(tmp_path, changes, message):
    codes, scales = quantized(torch.ones(200, 64))
    tensors = {"w.weight": codes, "w.weight_scale_inv": scales, **changes}
    folder = write_folder(tmp_path / "m", {name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(folder)


def test_nan_is_refused(tmp_path):
    codes, scales = quantized(torch.ones(4, 4))
    codes.view(torch.uint8)[1, 2] = 0x7F
    folder = write_folder(tmp_path / "m", {"w": codes, "w_scale_inv": scales})
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(WeightsError, match="tensor 'w': only finite values"),
    ):
        checkpoint.data("w")
