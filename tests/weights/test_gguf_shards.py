"""Models in several GGUF files, written by the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.errors import WeightsError

TENSORS = {f"blk.{i}.weight": np.full((2, 32), i, np.float32) for i in range(5)}


def write_shards(folder, names=((0, 1), (2, 3), (4,)), num_tensors=5, **wrong):
    """Parts that hold the tensors with these numbers; `wrong` has metadata of part 2."""
    paths = []
    for number, part in enumerate(names):
        path = folder / f"model-{number + 1:05}-of-{len(names):05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        keys = {"no": number, "count": len(names), **(wrong if number == 1 else {})}
        writer.add_uint16("split.no", keys["no"])
        writer.add_uint16("split.count", keys["count"])
        writer.add_int32("split.tensors.count", num_tensors)
        if number == 0:
            writer.add_name("in parts")
        for index in part:
            writer.add_tensor(f"blk.{index}.weight", TENSORS[f"blk.{index}.weight"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


@pytest.mark.parametrize("given", range(3))
def test_any_part_opens_all(tmp_path, given):
    paths = write_shards(tmp_path)
    with open_checkpoint(paths[given]) as checkpoint:
        assert checkpoint.architecture == "llama"
        assert checkpoint.config_source["general.name"] == "in parts"
        assert list(checkpoint.tensors) == list(TENSORS)
        assert checkpoint.files == paths
        for name, values in TENSORS.items():
            checkpoint.check_finite(name)
            assert bytes(checkpoint.data(name)) == values.tobytes()
            checkpoint.release(name)


def test_a_missing_part_is_named(tmp_path):
    paths = write_shards(tmp_path)
    paths[1].unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00003\.gguf: is missing"):
        open_checkpoint(paths[0])


@pytest.mark.parametrize("wrong", [{"no": 2}, {"count": 4}])
def test_a_part_of_another_model_is_refused(tmp_path, wrong):
    paths = write_shards(tmp_path, **wrong)
    with pytest.raises(WeightsError, match=rf"model-00002-of-00003\.gguf: .*'split\.{next(iter(wrong))}' is"):
        open_checkpoint(paths[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    paths = write_shards(tmp_path, names=((0, 1), (1, 2)))
    with pytest.raises(WeightsError, match=r"00002.*'blk.1.weight' is also in model-00001-of-00002"):
        open_checkpoint(paths[0])


def test_too_few_tensors_are_refused(tmp_path):
    paths = write_shards(tmp_path, num_tensors=6)
    with pytest.raises(WeightsError, match=r"'split.tensors.count' is 6, but all parts have 5 tensors"):
        open_checkpoint(paths[0])


def test_a_renamed_part_is_refused(tmp_path):
    path = write_shards(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(WeightsError, match=r"is not called NAME-00001-of-0000N\.gguf"):
        open_checkpoint(path)
