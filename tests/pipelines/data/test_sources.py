"""What is found in a folder, and the error for a source that can be read in several ways."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.data import sources
from pipelines.data.sources import AmbiguousError, Reading


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"1")
    return folder


def test_files_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    make(tmp_path, "b/2.JPG", "b/1.txt", "a.png", ".hidden/c.png", ".d.png", "__MACOSX/e.png")
    assert list(sources.find_files(tmp_path)) == ["a.png", "b/1.txt", "b/2.JPG"]
    assert list(sources.find_images(tmp_path)) == ["a.png", "b/2.JPG"]
    assert sources.find_folders(tmp_path) == [tmp_path / "b"]


def test_links_are_followed_and_end(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "itself").symlink_to(tmp_path / "a" / "itself")
    assert list(sources.find_files(tmp_path)) == ["a/1.png"]


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert sources.read_file(tmp_path / "a.png", "a.png") == b"1"
    for name, message in {
        "b.png": "b.png can't be read: No such file",
        "pipe.png": "pipe.png is not a regular file",
    }.items():
        with pytest.raises(TesseraError, match=message):
            sources.read_file(tmp_path / name, name)
    with pytest.raises(TesseraError, match=r"a\.png is larger than 0 MiB"):
        sources.read_file(tmp_path / "a.png", "a.png", limit=0)


def test_each_way_to_read_a_source_is_a_command() -> None:
    readings = [
        Reading("coco", {"image_dir": "my images"}, "boxes"),
        Reading("masks", {}, "the class of each pixel", ("*.json",)),
    ]
    error = AmbiguousError("two ways", readings=readings).with_commands("it's here", "data/x")
    first, *lines = [line.strip() for line in error.hint.splitlines()]
    assert first == "choose one:"
    words = [shlex.split(line, comments=True) for line in lines]
    start = ["tessera", "pack", "it's here", "--to", "data/x", "--format"]
    assert words[0] == [*start, "coco", "--option", "image_dir=my images"]
    assert words[1] == [*start, "masks", "--allow-unused", "*.json"]
