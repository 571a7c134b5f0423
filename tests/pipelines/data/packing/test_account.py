"""Every file of a source is counted once, and none that could matter is passed over."""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.core.errors import TesseraError
from pipelines.data.importers import image_folder
from pipelines.data.packing import account
from pipelines.data.packing.account import account_for, sort_files
from pipelines.data.packing.pack import pack

MakeFolder = Callable[..., Path]


def touch(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def test_a_pack_prints_and_keeps_its_account(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = touch(make_folder(tmp_path / "pets", ["cat", "dog"], 4), "README.md", "x.zip", "y.zip")
    lines: list[str] = []
    pack(str(source), tmp_path / "out", notify=lines.append)
    assert "files: 11 = 8 images + 1 documents + 2 not used (.zip 2)" in lines
    assert json.loads((tmp_path / "out" / account.FILE).read_text()) == {
        "files": 11,
        "images": 8,
        "labels": 0,
        "documents": 1,
        "allowed": 0,
        "others": {".zip": 2},
    }


def test_a_table_that_is_named_itself_says_what_it_uses(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "pets", ["images"], 6)
    rows = [f"images/{number:03d}.jpg,{'cat' if number % 2 else 'dog'}" for number in range(5)]
    table = source / "labels.csv"
    table.write_text("\n".join(["file,label", *rows]))
    lines: list[str] = []
    pack(str(table), tmp_path / "out", notify=lines.append)
    assert (
        f"files: 5 images + 1 label files; {table} is a file, so nothing beside it is looked at"
        in lines
    )
    with pytest.raises(TesseraError, match="no sample uses 1 picture"):  # the control: its folder
        pack(str(source), tmp_path / "other", notify=lines.append)


def test_a_source_without_files_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    pack("digits", tmp_path / "out", notify=lines.append)
    (line,) = [line for line in lines if line.startswith("files: ")]
    assert line == "files: digits isn't a folder, so no other files are looked for"


@pytest.mark.parametrize(
    ("stray", "message", "pattern"),
    [
        ("cat/x.svg", r"1 picture: 1 \.svg in cat \(cat/x\.svg\)", "cat/*.svg"),
        ("dog/x.XCF", r"1 \.XCF in dog \(dog/x\.XCF\)", "dog/*.XCF"),
        ("labels.json", r"1 label file: 1 \.json \(labels\.json\)", "*.json"),
        ("cat/a b/x.txt", r"1 \.txt in cat/a b \(cat/a b/x\.txt\)", "cat/a b/*.txt"),
        ("cat/[1].xml", r"1 \.xml in cat", "cat/*.xml"),
        (".hidden/x.png", r"1 \.png in \.hidden", ".hidden/*.png"),
    ],
)
def test_what_no_sample_uses_is_an_error_and_the_hint_helps(
    tmp_path: Path, make_folder: MakeFolder, stray: str, message: str, pattern: str
) -> None:
    source = touch(make_folder(tmp_path / "pets", ["cat", "dog"], 4), stray)
    with pytest.raises(TesseraError, match=message) as caught:
        account_for(image_folder.read(str(source), {})).check()
    assert caught.value.hint.endswith(f"--allow-unused {shlex.quote(pattern)}")
    allowed = account_for(image_folder.read(str(source), {}), [pattern])
    assert (allowed.files, allowed.allowed, allowed.unused) == (9, 1, ())
    (source / stray).unlink()  # the control
    account_for(image_folder.read(str(source), {})).check()


@pytest.mark.parametrize("name", ["n0", "n0.jpg?width=200", "n0.jpg.1", "n0.download"])
def test_a_picture_without_the_suffix_of_one_is_no_other_file(
    tmp_path: Path, make_folder: MakeFolder, name: str
) -> None:
    """As browsers and scripts save them; a whole class can be such files."""
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 4)
    (source / "cat" / name).write_bytes(b"P6 and other text that begins as an image may")
    account_for(image_folder.read(str(source), {})).check()  # the control: no picture
    (source / "cat" / "000.jpg").rename(source / "cat" / name)
    with pytest.raises(TesseraError, match="no sample uses 1 picture") as caught:
        account_for(image_folder.read(str(source), {})).check()
    assert caught.value.hint.startswith("give pictures the suffix of their format")
    pattern = shlex.split(caught.value.hint)[-1]
    assert account_for(image_folder.read(str(source), {}), [pattern]).allowed == 1


@pytest.mark.parametrize("suffix", [".svg", ".CR2", ".psd"])
def test_the_hint_for_a_picture_that_is_not_read(
    tmp_path: Path, make_folder: MakeFolder, suffix: str
) -> None:
    source = touch(make_folder(tmp_path / "pets", ["cat", "dog"], 4), f"cat/x{suffix}")
    with pytest.raises(TesseraError) as caught:
        account_for(image_folder.read(str(source), {})).check()
    assert caught.value.hint.startswith(f"{suffix.lower()} is not read: convert such files to PNG")
    assert "another layout" not in caught.value.hint


def test_many_files_are_shown_by_suffix_and_folder(tmp_path: Path) -> None:
    folder = touch(tmp_path, *(f"a/{n:03d}.jpg" for n in range(96)), "b/1.png", "b/1.txt")
    with pytest.raises(TesseraError) as caught:
        sort_files(folder, [], []).check()
    assert "no sample uses 1 label file and 97 pictures" in caught.value.message
    assert "96 .jpg in a (a/000.jpg, a/001.jpg, a/002.jpg, …); 1 .png in b" in caught.value.message


def test_many_folders_are_shown_as_one(tmp_path: Path) -> None:
    names = [f"set/id{n}/masks/{at}.png" for n in range(30) for at in range(2)]
    folder = touch(tmp_path, *names, "x/y.json")
    with pytest.raises(TesseraError) as caught:
        sort_files(folder, [], []).check()
    assert "60 .png in set/*/masks (set/id0/masks/0.png, set/id1" in caught.value.message
    assert len(caught.value.message) < 500
    patterns = shlex.split(caught.value.hint)[-3:]
    assert patterns == ["x/*.json", "--allow-unused", "set/*/masks/*.png"]
    assert sort_files(folder, [], [], [patterns[0], patterns[2]]).unused == ()


def test_special_files_are_named(tmp_path: Path) -> None:
    folder = touch(tmp_path / "set", "a/1.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "nothing.jpg").symlink_to("nowhere")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "again").symlink_to("a")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(folder / "socket"))
        found = sort_files(folder, [str(folder / "a/1.jpg")], [])
    assert {group.examples[0]: group.detail for group in found.unused} == {
        "again": "a folder that is in the source twice, by a link",
        "circle.jpg": "link to itself",
        "nothing.jpg": "link to nothing",
        "pipe.jpg": "pipe, socket or device",
        "socket": "pipe, socket or device",
    }
    assert (found.files, found.images) == (6, 1)


def test_files_of_systems_and_documents_are_no_error(tmp_path: Path) -> None:
    names = ["LICENSE", "README.roboflow.txt", "license.txt", "a.PDF", "a/.DS_Store", "Thumbs.db"]
    names += ["a/._1.jpg", "__MACOSX/a/1.jpg", ".git/x.json", "@eaDir/1.jpg", "load.py", "notice"]
    found = sort_files(touch(tmp_path, *names), [], [])
    assert (found.files, found.documents, found.unused) == (len(names), len(names), ())
    # The control: names that only look like these.
    others = touch(tmp_path / "x", "licensed/1.jpg", "readmes.txt", "mac/1.jpg", "readme.png")
    assert len(sort_files(others, [], []).unused) == 4


def test_a_file_used_by_another_name_is_used(tmp_path: Path) -> None:
    folder = touch(tmp_path / "set", "a/1.jpg", "a/2.jpg")
    (tmp_path / "alias").symlink_to(folder)
    used = [str(tmp_path / "alias" / "a" / "1.jpg"), str(folder / "a" / ".." / "a" / "2.jpg")]
    found = sort_files(folder, used, [])
    assert (found.files, found.images, found.unused) == (2, 2, ())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_parts_add_up(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    names = st.text("ab.é ", min_size=1, max_size=3).filter(lambda n: n not in (".", ".."))
    suffixes = st.sampled_from(["", ".jpg", ".txt", ".zip", ".md", ".JSON"])
    paths = data.draw(st.lists(st.tuples(names, names, suffixes), max_size=12))
    folder = tmp_path_factory.mktemp("set")
    files = {f"d{one}/f{two}{suffix}" for one, two, suffix in paths}
    touch(folder, *files)
    used = data.draw(st.sets(st.sampled_from(sorted(files)))) if files else set()
    found = sort_files(
        folder, [str(folder / p) for p in used], [], data.draw(st.sampled_from([(), ("da/*",)]))
    )
    parts = found.images + found.labels + found.documents + found.allowed
    parts += sum(found.others.values()) + sum(group.count for group in found.unused)
    assert parts == found.files == len(files)
    assert found.images == len(used)


@pytest.mark.slow
def test_a_hundred_thousand_files_take_a_second(tmp_path: Path) -> None:
    names = [f"{n % 100:02d}/{n}.jpg" for n in range(100_000)]
    for number in range(100):
        (tmp_path / f"{number:02d}").mkdir()
    for name in names:
        os.close(os.open(tmp_path / name, os.O_CREAT))
    started = time.process_time()
    source = image_folder.read(str(tmp_path), {})
    read = time.process_time() - started
    started = time.process_time()
    found = account_for(source)
    spent = time.process_time() - started
    assert found is not None
    assert (found.images, found.unused) == (100_000, ())
    print(f"read {read:.2f} s, account {spent:.2f} s of 100,000 files")
    assert spent < 3
