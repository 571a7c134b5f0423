"""The keys of a JSON file's first bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipelines.data.importers.support.json_peek import peek


def test_keys_have_the_keys_around_them(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {"images": [{"file_name": 'a"b{', "x": {"y": 1}}], "n": [1, [{"z": "images"}]]}
    path.write_text(json.dumps(content))
    keys, words = peek(path)
    assert keys == {
        ("images",),
        ("images", "file_name"),
        ("images", "x"),
        ("images", "x", "y"),
        ("n",),
        ("n", "z"),
    }
    assert words == {"images", "file_name", "x", "y", "n", "z"}


def test_a_long_file_is_read_at_both_ends_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"file_name": f"{n}.jpg"} for n in range(30_000)]
    path.write_text(json.dumps({"images": rows, "categories": [{"supercategory": "x"}]}))
    keys, words = peek(path)
    assert keys == {("images",), ("images", "file_name")}
    assert "supercategory" in words


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"[" * 100_000, b'"' * 9, b"}}]]:"])
def test_other_files_have_no_keys(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    assert peek(path).keys == frozenset()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert peek(tmp_path / "a.json").words == frozenset()
    assert peek(tmp_path / "none.json").words == frozenset()
