"""A data set is packed completely or not at all, and rejected samples are listed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import fresh_process
import pytest

from models.core.errors import TesseraError, UsageError
from pipelines.data import card as cards
from pipelines.data.inspection.verify import verify
from pipelines.data.packing import staging, statistics
from pipelines.data.packing.pack import pack

MakeFolder = Callable[..., Path]
MakeImage = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def left_behind(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if "packing" in p.name or p.name == "out"]


def spoil(source: Path, names: Mapping[str, bytes]) -> None:
    for name, data in names.items():
        (source / name).write_bytes(data)


def test_an_unreadable_image_stops_the_pack(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 10)
    half = (source / "cat" / "000.jpg").read_bytes()[:200]
    spoil(source, {"cat/bad.jpg": half, "dog/empty.png": b"", "dog/page.jpg": b"<html>"})
    with pytest.raises(TesseraError, match=r"3 of \d+ images can't be packed") as caught:
        pack(str(source), tmp_path / "out")
    message = str(caught.value)
    for shard_plan in ("unreadable image: 3", "cat/bad.jpg", "dog/empty.png", "--allow-rejected 3"):
        assert shard_plan in message
    assert "object at 0x" not in message
    assert left_behind(tmp_path) == [".out.packing"]
    listed = tmp_path / ".out.packing" / statistics.REJECTED
    assert str(listed) in message
    assert len(listed.read_text().splitlines()) == 3


@pytest.mark.parametrize("allowed", ["2", "10%", " 2 "])
def test_allowed_rejected_samples_are_listed(
    tmp_path: Path, make_folder: MakeFolder, allowed: str
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 10)
    spoil(source, {"cat/bad.jpg": b"x", "cat/worse.png": b"y"})
    card = pack(str(source), tmp_path / "out", allow_rejected=allowed)
    assert card.rejected == 2
    assert sum(split.samples for split in card.splits.values()) == 20
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / statistics.REJECTED).read_text().splitlines()
    ]
    assert {(row["key"], row["reason"]) for row in rows} == {
        ("cat/bad", "unreadable image"),
        ("cat/worse", "unreadable image"),
    }


def test_a_key_that_repeats_is_rejected(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 10)
    rows = [f"{name}/{n:03d}.jpg,{name}" for name in ("cat", "dog") for n in range(10)]
    table = source / "labels.csv"
    table.write_text("\n".join(["path,label", *rows, rows[0]]))
    card = pack(str(table), tmp_path / "out", allow_rejected="1")
    assert (card.rejected, sum(split.samples for split in card.splits.values())) == (1, 20)
    (row,) = map(json.loads, (tmp_path / "out" / statistics.REJECTED).read_text().splitlines())
    assert (row["key"], row["reason"]) == ("cat/000", "duplicate key")
    assert "cat/000.jpg has the key of cat/000.jpg" in row["detail"]


def test_more_rejected_samples_than_allowed_are_refused(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 10)
    spoil(source, {"cat/1.jpg": b"x", "cat/2.jpg": b"x"})
    for allowed in ("1", "9%"):
        with pytest.raises(TesseraError, match=r"2 of \d+ images can't be packed"):
            pack(str(source), tmp_path / "out", allow_rejected=allowed)


@pytest.mark.parametrize("allowed", ["", "-1", "1.5", "x", "101%", "-1%", "1/0", "nan", "%"])
def test_an_invalid_allowed_number_is_refused(
    tmp_path: Path, make_folder: MakeFolder, allowed: str
) -> None:
    source = make_folder(tmp_path / "pets", ["cat"], 3)
    with pytest.raises(UsageError, match="is not a number of samples"):
        pack(str(source), tmp_path / "out", allow_rejected=allowed)


def test_a_class_without_remaining_samples_is_refused(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 2)
    spoil(source, {"dog/000.jpg": b"x", "dog/001.jpg": b"x"})
    with pytest.raises(TesseraError, match="no train image of the class 'dog' left"):
        pack(str(source), tmp_path / "out", allow_rejected="2")
    assert left_behind(tmp_path) == []


def test_file_names_are_printed_without_terminal_escapes(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "pets", ["cat"], 3)
    (source / "cat" / "a\x1b[2Jb\nc.jpg").write_bytes(b"x")
    with pytest.raises(TesseraError, match="can't be packed") as caught:
        pack(str(source), tmp_path / "out")
    assert str(caught.value).isprintable()


def test_a_non_empty_output_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(TesseraError, match=r"the output folder .*out is not empty"):
        pack("digits", out)
    assert contents(tmp_path) == {"out/mine.txt": b"keep"}
    with pytest.raises(TesseraError, match="is a file"):
        pack("digits", out / "mine.txt")


def test_a_mount_point_is_refused_before_anything_is_read() -> None:
    with pytest.raises(TesseraError, match=r"is a mount point.*--to /proc/NAME"):
        pack("digits", Path("/proc"))


def test_a_packed_data_set_is_not_overwritten(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "pets", ["cat"], 3)
    pack(str(source), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(TesseraError, match="is already a packed data set"):
        pack(str(source), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_an_empty_output_folder_is_used(tmp_path: Path, make_folder: MakeFolder) -> None:
    (tmp_path / "new" / "out").mkdir(parents=True)
    source = make_folder(tmp_path / "pets", ["cat"], 3)
    assert (
        cards.read(tmp_path / "new" / "out") if pack(str(source), tmp_path / "new" / "out") else 0
    )


@pytest.mark.slow
def test_a_killed_pack_leaves_no_incomplete_data_set_and_the_next_one_succeeds(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 10)
    program = """
import os, signal, sys
from pathlib import Path
from pipelines.data.packing.pack import pack
stop = lambda done, total: os.kill(os.getpid(), signal.SIGKILL)
pack(sys.argv[1], Path(sys.argv[2]), progress=stop)
"""
    done = fresh_process.run(program, str(source), str(tmp_path / "out"))
    assert done.returncode == -9
    assert left_behind(tmp_path) == [".out.packing"]
    with pytest.raises(TesseraError):
        cards.read(tmp_path / "out")
    pack(str(source), tmp_path / "out")
    assert not verify(tmp_path / "out").differences
    assert left_behind(tmp_path) == ["out"]
    assert contents(tmp_path / "out") == contents_of_fresh(source, tmp_path / "fresh")


def contents_of_fresh(source: Path, to: Path) -> dict[str, bytes]:
    pack(str(source), to)
    return contents(to)


def test_two_packs_into_one_folder_don_t_mix(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "pets", ["cat"], 3)
    with (
        staging.stage(tmp_path / "out"),
        pytest.raises(TesseraError, match="another pack is writing"),
    ):
        pack(str(source), tmp_path / "out")
    assert left_behind(tmp_path) == ["out"]


def test_ctrl_c_before_the_first_shard_leaves_no_files(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "pets", ["cat"], 100)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(source), tmp_path / "out", progress=stop, shard_samples=100)
    assert left_behind(tmp_path) == []


def test_a_full_disk_is_reported(
    tmp_path: Path, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def fail(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith(".tar"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    source = make_folder(tmp_path / "pets", ["cat"], 3)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TesseraError, match="can't be written: No space left on device"):
        pack(str(source), tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_progress_ends_with_the_total(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "pets", ["cat"], 130)
    seen: list[tuple[int, int]] = []
    pack(str(source), tmp_path / "out", progress=lambda *at: seen.append(at))
    assert seen[-1] == (130, 130)
    assert seen == sorted(seen)
