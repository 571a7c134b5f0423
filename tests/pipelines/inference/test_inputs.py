"""What is predicted of what the user names, and what is said of the rest."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from faulty_server import web_server
from foreign_shards import samples, write_tar
from layouts.base import picture

from models.core.errors import TesseraError, UsageError
from pipelines.data.images import decode_image
from pipelines.inference import inputs
from pipelines.inference.inputs import LeftOut, expand, read_list


def names(folder: Path, *given: str) -> list[str]:
    found = expand([folder / text for text in given])
    return [os.path.relpath(one.name, folder) for one in found]


def test_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "deep/c.webp", "deep/er/d.PNG", ".hidden/e.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path / "deep")
    picture(tmp_path / "odd[1].png")
    assert names(tmp_path, "b.png", "a.jpg", "b.png") == ["b.png", "a.jpg", "b.png"]
    assert names(tmp_path, "deep") == ["deep/c.webp", "deep/er/d.PNG"]
    assert names(tmp_path, "*.png") == ["b.png", "odd[1].png"]
    assert names(tmp_path, "deep/**/*.PNG")[0] == "deep/er/d.PNG"
    assert names(tmp_path, "notes.txt") == ["notes.txt"]
    assert names(tmp_path, "odd[1].png") == ["odd[1].png"]
    assert names(tmp_path, "empty", "absent.png", "*.tiff") == ["empty", "absent.png", "*.tiff"]


def test_every_file_of_a_folder_is_predicted_or_counted(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.HEIC", "c.avif", "d.ppm", "e.jfif", ".hidden.png"):
        picture(tmp_path / name, form="PNG")
    picture(tmp_path / "noext", form="JPEG")
    for name in ("notes.txt", "x.json", "y.json", "README", "f.dng"):
        (tmp_path / name).write_text("{}")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    left_out = LeftOut()
    found = [Path(one.name).name for one in expand([tmp_path], left_out=left_out)]
    # f.dng is a photo: it gets a line that says why it isn't read.
    assert found == ["a.jpg", "b.HEIC", "c.avif", "d.ppm", "e.jfif", "f.dng", "noext"]
    assert sum(left_out.counts.values()) + len(found) == len(list(tmp_path.iterdir()))
    assert str(left_out).startswith("left out: 2 .json")
    assert left_out.counts["without suffix"] == 1
    (unread,) = expand([tmp_path / "f.dng"])
    with pytest.raises(TesseraError, match="not an image"):
        decode_image(unread.load(), 3)


def test_a_folder_of_images_alone_leaves_nothing_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    left_out = LeftOut()
    assert len(list(expand([tmp_path], left_out=left_out))) == 1
    assert str(left_out) == ""


def test_images_in_a_tar_are_inputs(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "in" / "train-0.tar", samples(1, 2))
    left_out = LeftOut()
    for given in (path, tmp_path / "in", tmp_path / "in" / "*.tar"):
        left_out.counts.clear()
        found = list(expand([given], left_out=left_out))
        assert [one.name for one in found] == [f"{path}/s0001.png", f"{path}/s0002.png"]
        assert left_out.counts == {".cls": 2}
        assert [one.load() for one in found] == [samples(1, 2)[at][1] for at in (0, 2)]


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b" + bytes(600), bytes(1024)])
def test_a_tar_that_cannot_be_read_has_a_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    (one,) = expand([tmp_path / "a.tar"])
    with pytest.raises(TesseraError, match=r"a\.tar (can't be read as a tar|has no images)"):
        one.load()


def test_a_list_names_inputs(tmp_path: Path) -> None:
    picture(tmp_path / "a b.jpg")
    path = tmp_path / "list.txt"
    path.write_bytes(b"a b.jpg\r\n\n  \nabsent.png\n")
    assert list(read_list(path)) == ["a b.jpg", "absent.png"]
    with pytest.raises(UsageError, match="can't be read"):
        list(read_list(tmp_path / "none.txt"))
    path.write_bytes(b"x" * (1 << 17))
    with pytest.raises(UsageError, match="line 1, is longer than 65,536 bytes"):
        list(read_list(path))


class _Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]


def test_standard_input_is_an_image_or_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = picture(tmp_path / "a.jpg").read_bytes()
    monkeypatch.setattr(sys, "stdin", _Stdin(data))
    (one,) = expand(["-"])
    assert (one.name, one.load(), one.load()) == ("-", data, data)
    monkeypatch.setattr(sys, "stdin", _Stdin(f"{tmp_path}/a.jpg\n{tmp_path}\n".encode()))
    assert [one.name for one in expand(["-"])] == [f"{tmp_path}/a.jpg"] * 2
    monkeypatch.setattr(sys, "stdin", _Stdin(b""))
    assert list(expand(["-"])) == []
    monkeypatch.setattr(inputs, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(sys, "stdin", _Stdin(data))
    with pytest.raises(TesseraError, match="has more than 100 bytes"):
        next(iter(expand(["-"]))).load()


def test_addresses_are_read_from_allowed_hosts(tmp_path: Path) -> None:
    data = picture(tmp_path / "a.jpg").read_bytes()
    with web_server(tmp_path) as port:
        url = f"http://127.0.0.1:{port}/a.jpg?token=secret"
        (one,) = expand([url], hosts=[f"127.0.0.1:{port}"])
        assert (one.name, one.file_name, one.load()) == (url, "a.jpg", data)
        (other,) = expand([url])
        with pytest.raises(TesseraError, match="is not allowed") as caught:
            other.load()
        assert f"--allow-host 127.0.0.1:{port}" in (caught.value.hint or "")
        assert "secret" not in str(caught.value)
