"""Existing WebDataset shards are indexed in place; invalid samples count against the allowed
number."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faulty_server import web_server
from foreign_shards import Members, add, image, read_all, samples, source, write_tar

from models.core.errors import TesseraError, UsageError
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.data.images import open_image
from pipelines.data.inspection import verify
from pipelines.data.packing import formats, in_place, pack
from pipelines.data.packing.in_place_tars import entries
from pipelines.data.shards import ShardReader
from pipelines.storage.base import CacheSettings, use_cache

__all__ = ["add", "source"]  # fixtures


# ── what is understood ────────────────────────────────────────────────────────────────────────


def test_a_folder_is_indexed_in_place(source: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in source.iterdir()}
    card = in_place.index(str(source), tmp_path / "out", options={})
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file()) == [
        "card.json",
        *["index.npy"] * 3,
    ]
    assert {split: held.samples for split, held in card.splits.items()} == {
        "train": 40,
        "val": 10,
        "test": 10,
    }
    assert cards.read(tmp_path / "out") == card
    assert (card.root, card.classes, card.task) == (str(source), ("0", "1"), "classification")
    assert card.splits["train"].class_counts == {"0": 20, "1": 20}
    result = list(read_all(tmp_path / "out", card))
    assert [(s.key, s.label) for s in result] == [(f"s{n:04d}", n % 2) for n in range(40)]
    assert [s.image for s in result] == [image(n) for n in range(40)]
    assert verify.verify(tmp_path / "out").differences == ()


def test_mean_and_sizes_are_computed_from_the_pixels(source: Path, tmp_path: Path) -> None:
    card = in_place.index(str(source), tmp_path / "out", options={})
    pixels = np.stack([np.asarray(open_image(image(n), "")) for n in range(40)]) / 255
    assert card.image.mean == pytest.approx(tuple(pixels.mean(axis=(0, 1, 2))))
    assert card.image.std == pytest.approx(tuple(pixels.std(axis=(0, 1, 2))))
    assert (card.image.max_height, card.image.max_width) == (4, 5)


def test_the_same_shards_have_the_same_digest(source: Path, tmp_path: Path) -> None:
    digests = {
        in_place.index(str(source), tmp_path / f"out{n}", options={}).digest for n in range(3)
    }
    assert len(digests) == 1


def test_remote_shards_are_indexed(source: Path, tmp_path: Path) -> None:
    use_cache(CacheSettings(tmp_path / "cache"))
    try:
        with web_server(source) as port:
            where = f"http://127.0.0.1:{port}"
            with pytest.raises(TesseraError, match="can't be listed"):
                in_place.index(where, tmp_path / "out", options={})
            listed = "set-train-{000000..000003}.tar,set-val-000004.tar,set-test-000005.tar"
            card = in_place.index(where, tmp_path / "out", options={"shards": listed})
            assert card.root == where
            assert [s.image for s in read_all(tmp_path / "out", card, "val")] == [
                image(n) for n in range(40, 50)
            ]
    finally:
        use_cache(None)


def test_pack_recognises_webdataset_shards(source: Path, tmp_path: Path) -> None:
    assert formats.recognise(str(source))[0] == "webdataset"
    card = pack.pack(str(source), tmp_path / "out", name="wild", licence="MIT")
    assert (card.name, card.licence, card.source) == ("wild", "MIT", "webdataset:wds")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_written_by_tarfile_are_read(form: int, tmp_path: Path) -> None:
    long = "f" * 90 + "/" + "g" * 60 if form == tarfile.USTAR_FORMAT else "é" * 60 + "/" + "x" * 100
    names = [f"{long}/{n}.jpg" for n in range(3)]
    path = write_tar(tmp_path / "x.tar", [(name, b"%d" % n) for n, name in enumerate(names)], form)
    with path.open("rb") as file:
        result = list(entries(file.fileno(), "x"))
        assert [entry.name for entry in result] == names
        assert [os.pread(file.fileno(), e.size, e.start) for e in result] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "posix", "ustar"])
def test_shards_written_by_gnu_tar_are_read(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = [f"{'d' * 60}/{'e' * 60}/{n}.jpg" for n in range(3)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    subprocess.run(
        ["tar", f"--format={form}", "--sort=name", "-cf", tmp_path / "x.tar", "-C", folder, "."],
        check=True,
    )
    with (tmp_path / "x.tar").open("rb") as file:
        result = list(entries(file.fileno(), "x"))
    assert [entry.name.removeprefix("./") for entry in result] == names


def test_shards_written_by_webdataset_are_read(tmp_path: Path) -> None:
    from webdataset import ShardWriter

    (tmp_path / "wds").mkdir()
    pattern = str(tmp_path / "wds" / "train-%06d.tar")
    with ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for n in range(10):
            writer.write({"__key__": f"a/b{n}", "png": image(n), "cls": n % 3})
    card = in_place.index(str(tmp_path / "wds"), tmp_path / "out", options={})
    result = [s for split in card.splits for s in read_all(tmp_path / "out", card, split)]
    assert sorted((s.key, s.label) for s in result) == [(f"a/b{n}", n % 3) for n in range(10)]


def test_without_splits_whole_shards_become_val_and_test() -> None:
    paths = [f"part-{n:03d}.tar" for n in range(40)]
    splits = in_place.find_splits(paths, seed=0)
    assert splits == in_place.find_splits(paths[::-1], seed=0)
    assert splits != in_place.find_splits(paths, seed=1)
    assert sorted(splits.values()) == ["test"] * 4 + ["train"] * 32 + ["val"] * 4
    told = in_place.find_splits(["a/train/0.tar", "a/validation-1.tar", "my_TEST.tar"], seed=0)
    assert sorted(told.values()) == ["test", "train", "val"]
    with pytest.raises(TesseraError, match="names two splits"):
        in_place.find_splits(["train/val-0.tar"], seed=0)


@pytest.mark.parametrize(
    ("label", "options", "classes"),
    [
        ({"cls": b"7\n"}, {}, ("3", "7")),
        ({"cls": b"cat"}, {"classes": "3,cat"}, ("3", "cat")),
        ({"txt": b" cat \n"}, {"label": "txt"}, ("cat", "dog")),
        ({"json": b'{"y": 7}'}, {"label": "json:y"}, ("3", "7")),
        ({"json": b'{"y": "cat", "z": [1]}'}, {"label": "json:y"}, ("cat", "dog")),
    ],
)
def test_labels_are_read_in_every_supported_form(
    label: dict[str, bytes], options: dict[str, str], classes: tuple[str, ...], tmp_path: Path
) -> None:
    ((extension, data),) = label.items()
    other = data.replace(b"cat", b"dog" if b"3" not in str(classes).encode() else b"3")
    other = other.replace(b"7", b"3")
    members = []
    for n in range(4):
        members += [(f"{n}.png", image(n)), (f"{n}.{extension}", data if n % 2 else other)]
    write_tar(tmp_path / "in" / "train.tar", members)
    card = in_place.index(str(tmp_path / "in"), tmp_path / "out", options=options)
    assert card.classes == classes
    known = [classes[s.label] for s in read_all(tmp_path / "out", card)]
    assert len(set(known)) == 2
    assert known == known[:2] * 2


def test_images_alone_have_no_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "train.tar", [(f"{n}.png", image(n)) for n in range(3)])
    card = in_place.index(str(tmp_path / "in"), tmp_path / "out", options={"label": "none"})
    assert (card.task, card.classes) == ("images", ())
    assert [s.label for s in read_all(tmp_path / "out", card)] == [-1] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "json"}, "label=json"),
        ({"label": "xml"}, "label=xml"),
        ({"extra": "run"}, "extra=run"),
        ({"keys": "x"}, "keys=x"),
        ({"shards": "a{5..1}.tar"}, "not a range"),
        ({"shards": "a{0..999999999}.tar"}, "not a range"),
    ],
)
def test_options_are_checked(
    options: dict[str, str], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        in_place.index(str(source), tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


# ── what is wrong with a sample ───────────────────────────────────────────────────────────────


@pytest.mark.fault(8, 27)
@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", image(1))], "no label"),
        ([("a.cls", b"1")], "no image"),
        ([("a.png", image(1)), ("a.jpg", image(1)), ("a.cls", b"1")], "several images"),
        ([("a.png", b"GIF8"), ("a.cls", b"1")], "unreadable image"),
        ([("a.png", b""), ("a.cls", b"1")], "unreadable image"),
        ([("a.png", image(1)), ("a.cls", b"-1")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"-100")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"1.5")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"9" * 30)], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"\xff\xfe")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"x" * 2000)], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"a\x1b[2Jb")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"1"), ("a.txt", b"x")], "unknown member"),
        ([("README", b"x")], "unknown member"),
    ],
)
def test_an_invalid_sample_counts_against_the_allowed_number(
    members: Members, reason: str, add: Callable[..., Card], tmp_path: Path
) -> None:
    with pytest.raises(TesseraError, match=f"{reason}: 1"):
        add([*samples(1, 2), *members])
    assert not (tmp_path / "out").exists()
    card = add([*samples(1, 2), *members], allow_rejected="1")
    assert card.rejected == 1
    assert [s.key for s in read_all(tmp_path / "out", card)] == ["s0001", "s0002"]
    row = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert row["reason"] == reason


@pytest.mark.fault(27, 28)
@pytest.mark.parametrize(
    "data",
    [
        b'{"y": NaN}',
        b'{"y": 1, "y": 2}',
        b'{"y": ' + b"[" * 200_000,
        b"",
        b"{}",
        b'{"y": true}',
        b'{"y": [1]}',
        b'{"y": -1}',
        b'{"y": 1e9}',
        b'{"y": ' + b"9" * 30 + b"}",
    ],
    ids=lambda data: data[:20].decode(),
)
def test_an_invalid_json_label_is_rejected(data: bytes, add: Callable[..., Card]) -> None:
    good = [("g.png", image(1)), ("g.json", b'{"y": 1}')]
    with pytest.raises(TesseraError, match=r"(unreadable label|unknown class): 1"):
        add([*good, ("a.png", image(1)), ("a.json", data)], label="json:y", extra="skip")


def test_classes_can_be_set_by_an_option(add: Callable[..., Card]) -> None:
    with pytest.raises(TesseraError, match="unknown class"):
        add([*samples(1, 2), ("a.png", image(1)), ("a.cls", b"bird")], classes="cat,dog")
    with pytest.raises(TesseraError, match="some labels are numbers and some are names"):
        add([*samples(1, 2), ("a.png", image(1)), ("a.cls", b"bird")])


@pytest.mark.fault(30)
def test_a_class_missing_in_train_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "train.tar", samples(2, 4))
    write_tar(tmp_path / "in" / "val.tar", samples(1))
    with pytest.raises(TesseraError, match="val has the class '1', train doesn't"):
        in_place.index(str(tmp_path / "in"), tmp_path / "out", options={})


APPLE = b"\0\5\x16\7" * 20


@pytest.mark.parametrize("name", ["._{}", "__MACOSX/{}", "__MACOSX/._{}", "./._{}"])
def test_members_of_macos_are_skipped_and_counted(tmp_path: Path, name: str) -> None:
    for number, split in enumerate(("train", "val")):
        good = samples(*range(10 * number, 10 * number + 4))
        members = [m for n, data in good for m in ((name.format(n), APPLE), (n, data))]
        write_tar(tmp_path / "wds" / f"{split}.tar", members)
    lines: list[str] = []
    card = in_place.index(str(tmp_path / "wds"), tmp_path / "out", options={}, notify=lines.append)
    assert [split.samples for split in card.splits.values()] == [4, 4]
    assert [line for line in lines if "macOS" in line] == [
        "skipped: 16 members of macOS, named ._… or in __MACOSX"
    ]


def test_other_members_with_a_leading_dot_are_not_skipped(add: Callable[..., Card]) -> None:
    """The control: such a sample is rejected, not passed over."""
    with pytest.raises(TesseraError, match="key"):
        add([(".x.png", image(1)), (".y.png", image(2)), *samples(3)])


@pytest.mark.parametrize("stem", ["img.v1.{}", "2024.01.02/a.b.{}", "x{}.large"])
def test_names_with_dots_are_explained_and_have_an_option(
    add: Callable[..., Card], stem: str
) -> None:
    names = [stem.format(number) for number in range(4)]
    labels = [b"%d" % (number % 2) for number in range(4)]
    members = [m for n, y in zip(names, labels) for m in ((f"{n}.png", image(3)), (f"{n}.cls", y))]
    with pytest.raises(TesseraError, match="a key ends at the first dot of a name") as caught:
        add(members)
    assert "--option dot=last" in (caught.value.hint or "")
    assert "extra=skip" not in (caught.value.hint or "")
    with pytest.raises(TesseraError, match="a key ends at the first dot"):
        add(members, extra="skip")
    assert add(members, dot="last").splits["train"].samples == 4


def test_an_image_with_another_beside_it_has_no_dot_too_many(add: Callable[..., Card]) -> None:
    """The control: x.seg.png is another member of the sample x."""
    members = [*samples(1), *samples(2)]
    assert (
        add(
            [*members, ("s0003.png", image(3)), ("s0003.seg.png", image(4)), ("s0003.cls", b"1")],
            extra="skip",
        )
        .splits["train"]
        .samples
        == 3
    )


@pytest.mark.parametrize("end", [".tar.gz", ".tgz", ".tar.zst", ".TAR.GZ"])
def test_compressed_shards_are_named_at_once(tmp_path: Path, end: str) -> None:
    (tmp_path / "wds").mkdir()
    for number in range(2):
        (tmp_path / "wds" / f"train-{number}{end}").write_bytes(b"\x1f\x8b")
    for given in (tmp_path / "wds", tmp_path / "wds" / f"train-0{end}"):
        with pytest.raises(TesseraError, match=f"train-0{re.escape(end)}.* is a compressed tar"):
            formats.recognise(str(given))


def test_compressed_shards_beside_others_are_not_passed_over(source: Path, tmp_path: Path) -> None:
    (source / "train-9.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(TesseraError, match=r"train-9\.tar\.gz is a compressed tar"):
        in_place.index(str(source), tmp_path / "out", options={})
    (source / "train-9.tar.gz").unlink()
    in_place.index(str(source), tmp_path / "out", options={})


@pytest.mark.parametrize("name", ["train.tar", "all of it.tar"])
def test_one_tar_is_a_source(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a" / name, samples(*range(4)))
    write_tar(tmp_path / "a" / "other.tar", samples(5))
    assert formats.recognise(str(tmp_path / "a" / name)) == ("webdataset", "one tar")
    card = in_place.index(str(tmp_path / "a" / name), tmp_path / "out", options={})
    assert (card.name, card.split("train").samples) == (name.removesuffix(".tar"), 4)
    monkeypatch.chdir(tmp_path / "a")
    assert in_place.index(name, tmp_path / "out2", options={}).digest == card.digest
    reader = ShardReader(tmp_path / "out2", card, "train")
    assert reader.read(0).key == "s0000"


def test_files_beside_shards_are_accounted_for(source: Path, tmp_path: Path) -> None:
    for name in ("set-train-000000_stats.json", "set-train-000000.parquet", "README.md"):
        (source / name).write_text("{}")
    lines: list[str] = []
    card = in_place.index(str(source), tmp_path / "out", options={}, notify=lines.append)
    assert lines[0] == "files: 9 = 8 label files + 1 documents"
    (source / "classnames.txt").write_text("a")
    (source / "stray.png").write_bytes(image(1))
    with pytest.raises(TesseraError, match="no sample uses 1 label file and 1 picture"):
        in_place.index(str(source), tmp_path / "out2", options={})
    allowed = ("*.txt", "*.png")
    again = in_place.index(str(source), tmp_path / "out2", options={}, allow_unused=allowed)
    assert again.digest == card.digest
