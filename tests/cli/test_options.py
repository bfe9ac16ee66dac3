from __future__ import annotations

import pytest

from jinn.cli.options import parse_size, read_text
from jinn.sizes import format_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1e9", 10**9),
        ("4GB", 4 * 10**9),
        ("1.5 KiB", 1536),
        ("7", 7),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "2G", "2gib", "-1", "0", "0.1", "nan", "inf", "1e99", "2GiB2", "٣"]
)
def test_no_sizes(text):
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_format_size():
    assert [format_size(n) for n in (0, 999, 1000, 2.5e6, 3e9, 4e12)] == [
        "0 B", "999 B", "1.0 kB", "2.5 MB", "3.0 GB", "4.0 TB",
    ]  # fmt: skip


def test_read_text_names_the_byte(tmp_path):
    path = tmp_path / "prompt"
    path.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="prompt: byte 2 is not UTF-8"):
        read_text(path)
