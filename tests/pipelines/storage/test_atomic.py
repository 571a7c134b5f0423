"""A file appears complete or not at all; pipes and devices are never replaced."""

from __future__ import annotations

import json
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.storage import atomic


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines"
    with atomic.write_atomic(path) as file:
        file.write("one\n")
        assert not path.exists()
    assert path.read_text() == "one\n"
    writing = atomic.write_atomic(path)
    writing.__enter__().write("half")
    stopped = KeyboardInterrupt()
    assert not writing.__exit__(type(stopped), stopped, None)
    assert path.read_text() == "one\n"
    assert [p.name for p in path.parent.iterdir()] == ["lines"]


def test_a_pipe_and_a_device_are_written_to(tmp_path: Path) -> None:
    """Root would otherwise lose them: /dev/null was replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    with atomic.write_atomic(pipe) as file:
        file.write("through")
    reader.join(10)
    assert received == ["through"]
    assert pipe.is_fifo()
    with atomic.write_atomic(Path(os.devnull)) as file:
        file.write("away")
    atomic.write_bytes_atomic(Path(os.devnull), b"away")
    assert Path(os.devnull).is_char_device()


def test_an_open_stream_is_written_to(tmp_path: Path) -> None:
    """`--out /dev/stdout > file` must write to that file: the link in /dev must stay."""
    with (tmp_path / "redirected").open("w+") as stream:
        inode = os.fstat(stream.fileno()).st_ino
        atomic.write_text_atomic(Path(f"/dev/fd/{stream.fileno()}"), "through")
        assert stream.read() == "through"
    assert (tmp_path / "redirected").stat().st_ino == inode


@pytest.mark.parametrize("durable", [False, True])
def test_text_json_and_bytes(tmp_path: Path, durable: bool) -> None:
    atomic.write_text_atomic(tmp_path / "a", "Größe\n", durable=durable)
    atomic.write_json_atomic(tmp_path / "b", {"a": [1]}, durable=durable)
    atomic.write_bytes_atomic(tmp_path / "c", b"\x00\xff", durable=durable)
    assert (tmp_path / "a").read_bytes() == "Größe\n".encode()
    assert json.loads((tmp_path / "b").read_text()) == {"a": [1]}
    assert (tmp_path / "c").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_the_old_file_is_kept_if_the_value_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic.write_json_atomic(path, 1)
    with pytest.raises(TypeError):
        atomic.write_json_atomic(path, object())
    assert path.read_text() == "1"


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    link = tmp_path / "link"
    link.symlink_to("target")
    atomic.write_text_atomic(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_file_is_moved(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    for content in ("one", "two"):
        source.write_text(content)
        atomic.move_atomic(source, target)
        assert target.read_text() == content
        assert not source.exists()


def test_replace_file_yields_a_path_with_the_same_suffix(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with atomic.replace_file(target) as part:
        assert (part.parent, part.suffix) == (tmp_path, ".onnx")
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert stat.S_ISREG(target.stat().st_mode)
    with atomic.replace_file(target, ".pt2") as part:
        assert part.suffix == ".pt2"
        part.write_text("new")
    with suppress(KeyboardInterrupt), atomic.replace_file(target) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_replace_folder_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    for content in ("old", "new"):
        with atomic.replace_folder(target) as part:
            (part / "file").write_text(content)
            assert part.parent == tmp_path
            assert (target / "file").exists() == (content == "new")
        assert (target / "file").read_text() == content
    with suppress(KeyboardInterrupt), atomic.replace_folder(target) as part:
        (part / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
