"""The file of packed weights: there or not, never in part."""

from __future__ import annotations

import threading

import pytest

from jinn.weights.errors import WeightsError
from jinn.weights.packed import PAGE, PackedFile, packed_key

SIZES = {"a": 5000, "b": 1, "c": PAGE}
KEY = packed_key("model", 1)


def fill(file):
    """Write each tensor's name all over its place, and seal it."""
    with file.path.open("r+b") as out:
        for name, nbytes in SIZES.items():
            out.seek(file.offset(name))
            out.write(name.encode() * nbytes)
    for name in SIZES:
        file.seal(name)


def test_a_finished_file_is_found_whole(tmp_path):
    with PackedFile(tmp_path / "new" / "folder" / "a.packed", KEY, SIZES) as file:
        assert not file.is_whole
        fill(file)
        file.finish()
    with PackedFile(tmp_path / "new" / "folder" / "a.packed", KEY, SIZES) as file:
        assert file.is_whole
        data = file.path.read_bytes()
        for name, nbytes in SIZES.items():
            assert file.offset(name) % PAGE == 0
            assert data[file.offset(name) :][:nbytes] == name.encode() * nbytes
        file.finish()


def test_an_unfinished_file_is_not_there_and_leaves_nothing(tmp_path):
    with PackedFile(tmp_path / "a.packed", KEY, SIZES) as file:
        fill(file)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    with PackedFile(tmp_path / "a.packed", KEY, SIZES) as file:
        assert not file.is_whole


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: b""])
def test_a_damaged_file_is_written_anew(tmp_path, damage):
    with PackedFile(tmp_path / "a.packed", KEY, SIZES) as file:
        fill(file)
        file.finish()
    file.path.write_bytes(damage(file.path.read_bytes()))
    with PackedFile(tmp_path / "a.packed", KEY, SIZES) as again:
        assert not again.is_whole
        fill(again)
        again.finish()
    with PackedFile(tmp_path / "a.packed", KEY, SIZES) as again:
        assert again.is_whole


@pytest.mark.parametrize("name", SIZES)
def test_data_that_is_not_what_was_packed_is_found(tmp_path, name):
    with PackedFile(tmp_path / "a.packed", KEY, SIZES) as file:
        fill(file)
        file.finish()
        file.verify()
    with file.path.open("r+b") as out:
        out.seek(file.offset(name) + SIZES[name] - 1)
        out.write(b"x")
    with PackedFile(tmp_path / "a.packed", KEY, SIZES) as file:
        assert file.is_whole
        with pytest.raises(WeightsError, match=f"tensor '{name}' is not as it was packed"):
            file.verify()


def test_a_header_that_is_no_json_is_no_file(tmp_path):
    with PackedFile(tmp_path / "a.packed", KEY, SIZES) as file:
        fill(file)
        file.finish()
    data = file.path.read_bytes()
    file.path.write_bytes(data.replace(b'"a": [', b'"a": {', 1))
    with PackedFile(tmp_path / "a.packed", KEY, SIZES) as file:
        assert not file.is_whole


def test_another_key_or_other_sizes_take_the_place_of_the_file(tmp_path):
    path = tmp_path / "a.packed"
    with PackedFile(path, KEY, SIZES) as file:
        fill(file)
        file.finish()
    for key, sizes in [(packed_key("model", 2), SIZES), (KEY, SIZES | {"b": 2})]:
        with PackedFile(path, key, sizes) as other:
            assert not other.is_whole
            assert not path.exists()
            fill(other)
            other.finish()
        assert sorted(file.suffix for file in tmp_path.iterdir()) == [".lock", ".packed"]


def test_who_comes_second_waits_and_finds_the_file(tmp_path):
    found = []

    def second():
        with PackedFile(tmp_path / "a.packed", KEY, SIZES) as file:
            found.append(file.is_whole)

    with PackedFile(tmp_path / "a.packed", KEY, SIZES) as file:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        fill(file)
        file.finish()
    thread.join(10)
    assert found == [True]


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be kept here"):
        PackedFile(tmp_path / "file" / "folder" / "a.packed", KEY, SIZES)


def test_no_room_is_an_error_before_anything_is_packed(tmp_path):
    with pytest.raises(WeightsError, match="no room"), PackedFile(tmp_path / "a.packed", KEY, {"a": 2**60}):
        pass
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
