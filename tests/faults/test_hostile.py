"""Data sets and sources that were made to do harm, with digests and checksums that are right."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_sets import pack_set
from PIL import Image
from sample_sources import noise, save

from jobs.shared.terminal import json_line
from models.core.errors import TesseraError
from pipelines.data import card as cards
from pipelines.data import images, index, shards
from pipelines.data.card import Card
from pipelines.data.inspection import report, survey
from pipelines.data.inspection import verify as inspection_verify
from pipelines.data.jpeg import MAX_SCANS, FastDecoder
from pipelines.data.loading import preflight
from pipelines.data.loading.loaders import TrainLoader
from pipelines.data.packing import pack
from pipelines.interfaces import World
from pipelines.storage.open import open_shards, open_storage

MakeSet = Callable[..., tuple[Path, Card]]
MakeFolder = Callable[..., Path]
ESCAPE = "\x1b[2J"


def inspect(folder: Path) -> None:
    card = cards.read(folder)
    survey.check(folder, card)
    report.render(survey.take(folder, card, samples=4))


def verify(folder: Path) -> None:
    found = inspection_verify.verify(folder, workers=1).differences
    if found:
        raise TesseraError(found[0])


def plan(folder: Path) -> None:
    preflight.check_feedable(cards.read(folder), workers=1, batch_size=2, where=folder)


def train(folder: Path) -> None:
    card = cards.read(folder)
    loader = TrainLoader(folder, card, card.spec(), batch_size=2, seed=0, world=World(0, 1))
    assert sum(step.counted for step in loader.epoch(0)) == card.split("train").samples


WAYS = (inspect, verify, plan, train)


# ── cards ─────────────────────────────────────────────────────────────────────────────────────

SHARD = ("splits", "train", "shards", 0)
FORGED: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "fewer than none": ((*SHARD, "samples"), -3),
    "10^9 samples": ((*SHARD, "samples"), 10**9),
    "an endless shard": ((*SHARD, "size_bytes"), 1 << 70),
    "no channels": (("image", "channels"), 0),
    "no height": (("image", "max_height"), 0),
    "a height of 10^12": (("image", "max_height"), 10**12),
    "no mean": (("image", "mean"), []),
    "an infinite std": (("image", "std"), [1e999]),
    "another task": (("task",), "run"),
    "no classes": (("classes",), []),
    "fewer classes": (("classes",), ["a", "b"]),
    "a class twice": (("classes",), ["a", "a", "c"]),
    "other counts": (("splits", "train", "class_counts"), {"z": 1}),
    "no splits": (("splits",), {}),
    "another version": (("version",), 99),
    "a path up": ((*SHARD, "path"), "../../etc/passwd"),
    "a path of itself": ((*SHARD, "path"), "."),
    "a folder as shard": ((*SHARD, "path"), "train"),
    "a path that steers": ((*SHARD, "path"), f"train/{ESCAPE}.tar"),
    "a pipe as root": (("root",), "pipe:touch marker"),
    "a folder as index": (("splits", "train", "index"), "train"),
}


def forge(folder: Path, place: tuple[str | int, ...], value: Any) -> None:
    """Changes the card and gives it the digest that is right then."""
    tree: Any = json.loads((folder / "card.json").read_text())
    at = tree
    for shard_plan in place[:-1]:
        at = at[shard_plan]
    at[place[-1]] = value
    with suppress(ValueError):  # what is no card needs none
        tree["digest"] = Card.model_validate(tree).content_digest()
    (folder / "card.json").write_text(json.dumps(tree))


@pytest.mark.fault(10, 12, 14, 30)
@pytest.mark.parametrize("name", FORGED)
def test_a_card_that_lies_is_an_error_of_ours(
    name: str, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every way at least one says so; none of them fails in another way, hangs or runs
    anything."""
    folder, _ = make_set(6, shard_samples=3)
    monkeypatch.chdir(folder)
    for way in WAYS:
        way(folder)
    forge(folder, *FORGED[name])
    said = []
    for way in WAYS:
        try:
            way(folder)
        except TesseraError as error:
            said.append(str(error))
    assert said
    assert all(line.isprintable() for line in said), said
    assert not (folder / "marker").exists()


def test_a_set_of_images_without_spread_can_be_trained_on(tmp_path: Path) -> None:
    """All pixels alike have a std of 0, by which they would be divided."""
    white = Image.new("L", (4, 4), 255)
    card = pack_set(tmp_path, "images", {"train": [("a", white, None)]})
    flat = card.image.model_copy(update={"std": (0.0,)})
    assert card.model_copy(update={"image": flat}).spec().std == (1.0,)


def test_a_size_that_no_memory_has_is_refused(make_set: MakeSet) -> None:
    _, card = make_set(3)
    with pytest.raises(TesseraError, match=r"too large.*data\.height"):
        card.spec(20_000, 20_000)


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("where", "root", "taken"),
    [
        ("http://127.0.0.1:9/set", "/etc", False),
        ("http://127.0.0.1:9/set", "file:///etc", False),
        ("http://127.0.0.1:9/set", "http://127.0.0.2:9/set", False),
        ("http://127.0.0.1:9/set", "s3://bucket/set", False),
        ("s3://bucket/set", "http://127.0.0.1:9/set", False),
        ("memory://set", "/etc", False),
        ("http://127.0.0.1:9/set", "http://127.0.0.1:9/other", True),
        ("memory://set", "memory://other", True),
        ("set", "http://127.0.0.1:9/set", True),
        ("set", "/other", True),
    ],
)
def test_a_card_from_elsewhere_sends_a_reader_nowhere(where: str, root: str, taken: bool) -> None:
    """Only a card in a folder, which is the user's own, may name any place."""
    if taken:
        assert open_shards(where, root).where == root
        return
    with pytest.raises(TesseraError, match="says that its shards are in"):
        open_shards(where, root)
    open_storage(root)  # the control: as an address of the user's own it is one


@pytest.mark.slow
@pytest.mark.fault(12)
def test_a_card_of_many_shards_is_read_in_time(make_set: MakeSet) -> None:
    _, card = make_set(3)
    split = card.splits["train"]
    shard = split.shards[0].model_copy(update={"samples": 0})
    many = tuple(shard.model_copy(update={"path": f"train/{n}.tar"}) for n in range(50_000))
    large = card.model_copy(
        update={"splits": {"train": split.model_copy(update={"shards": (split.shards[0], *many)})}}
    ).sealed()
    began = time.process_time()
    assert cards.parse(large.to_json(), "here").digest == large.digest
    assert time.process_time() - began < 10


# ── indices ───────────────────────────────────────────────────────────────────────────────────


def reindex(folder: Path, change: Callable[[Any], None]) -> None:
    """Changes the rows of train and makes all checksums right again."""
    card = cards.read(folder)
    split = card.splits["train"]
    rows = np.load(folder / split.index)
    change(rows)
    starts = np.cumsum([0, *(shard.samples for shard in split.shards)])
    tables = [rows[start:end] for start, end in pairwise(starts)]
    sums, size, sha256 = index.write_index(folder / split.index, tables)
    made = tuple(s.model_copy(update={"rows_sha256": x}) for s, x in zip(split.shards, sums))
    update = {"shards": made, "index_bytes": size, "index_sha256": sha256}
    changed = card.model_copy(update={"splits": {"train": split.model_copy(update=update)}})
    (folder / "card.json").write_text(changed.sealed().to_json())


def swap(rows: Any) -> None:
    for name in ("offset", "size", "crc32"):
        rows[name][[0, 1]] = rows[name][[1, 0]]


def steer(rows: Any) -> None:
    rows["key"][0] = b"\x1b[2J"


def relabel(rows: Any) -> None:
    rows["label"][0] = 2


@pytest.mark.fault(9, 10, 27)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap, "its samples overlap"),
        (relabel, "its class differs from the index"),
        (steer, "a key with characters that are not allowed"),
    ],
)
def test_rows_of_other_samples_are_found_by_verify(
    change: Callable[[Any], None], said: str, make_set: MakeSet
) -> None:
    folder, _ = make_set(6, shard_samples=3)
    reindex(folder, lambda rows: None)
    verify(folder)
    reindex(folder, change)
    with pytest.raises(TesseraError, match=said):
        verify(folder)
    if change is steer:
        with pytest.raises(TesseraError, match=said):
            train(folder)


# ── what is printed ───────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(10)
def test_errors_and_answers_can_t_steer_a_terminal() -> None:
    error = TesseraError(f"{ESCAPE}a\u202eb\udcff\x9b", hint="\x07")
    assert str(error) == r"\x1b[2Ja\u202eb\udcff\x9b. \x07"
    assert str(TesseraError("one\ntwo é")) == "one\ntwo é"
    value = {"path": os.fsdecode(b"\xff.png"), "class": f"é{ESCAPE}\x9b\U000e0001"}
    line = json_line(value)
    assert line.isprintable()
    assert "é" in line
    assert json.loads(line) == value
    plain = json.dumps(value, ensure_ascii=False)  # the control
    assert not plain.isprintable()
    with pytest.raises(UnicodeEncodeError):
        plain.encode()


# ── files that are none ───────────────────────────────────────────────────────────────────────


@pytest.mark.fault(11)
@pytest.mark.parametrize("name", ["card.json", "train/index.npy", "train/000000.tar"])
def test_a_pipe_in_a_data_set_is_not_waited_for(name: str, make_set: MakeSet) -> None:
    folder, _ = make_set(6, shard_samples=3)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for way in WAYS:
        with pytest.raises(TesseraError, match=r"missing|has no card\.json"):
            way(folder)


@pytest.mark.slow
@pytest.mark.control(11)
def test_a_pipe_is_waited_for_without_the_look(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    program = [sys.executable, "-c", f"open({str(tmp_path / 'pipe')!r}, 'rb')"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(program, timeout=3)


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def above(path: Path) -> None:
    path.symlink_to(path.parent.parent)


def nothing(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.fault(11)
@pytest.mark.parametrize("make", [os.mkfifo, circle, above, nothing, os.mkdir])
def test_what_is_no_image_file_is_passed_over(
    make: Callable[[Path], None], tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "in", ["a", "b"], 4)
    make(source / "a" / "x.jpg")
    card = pack.pack(str(source), tmp_path / "out")
    assert sum(split.samples for split in card.splits.values()) == 8


@pytest.mark.fault(11)
def test_a_pipe_among_shards_or_annotations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wds").mkdir()
    os.mkfifo(tmp_path / "wds" / "train-0.tar")
    with pytest.raises(TesseraError, match=r"train-0\.tar of .* is not a regular file"):
        pack.pack(str(tmp_path / "wds"), tmp_path / "out", format="webdataset")
    for number in range(6):
        save(tmp_path / "masks" / "images" / f"{number}.jpg", noise(number))
        save(tmp_path / "masks" / "masks" / f"{number}.png", noise(number, channels=1) % 2 * 255)
    (tmp_path / "masks" / "masks" / "0.png").unlink()
    os.mkfifo(tmp_path / "masks" / "masks" / "0.png")
    with pytest.raises(TesseraError, match=r"masks/0\.png is not a regular file"):
        pack.pack(str(tmp_path / "masks"), tmp_path / "out", format="masks")


@pytest.mark.fault(10, 11)
def test_a_table_s_names_are_no_way_out(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / "in" / f"{number}.png", noise(number))
    rows = [f"{number}.png,{number % 2}" for number in range(6)]
    bad = ["../../etc/passwd,0", "/etc/passwd,0", "a\0b.png,1", f"{ESCAPE}.png,1", "\u202e.png,0"]
    (tmp_path / "in" / "t.csv").write_text("\n".join(["path,label", *rows, *bad]) + "\n")
    with pytest.raises(TesseraError) as refused:
        pack.pack(str(tmp_path / "in"), tmp_path / "out")
    assert "(path outside the source: 3, missing image: 2)" in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.fault(3)
def test_a_file_that_changes_while_it_is_packed_is_packed_as_it_was_read(
    tmp_path: Path, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the shard was checked: the bytes that were looked at are those that are
    written."""
    from pipelines.data.importers import image_folder

    source = make_folder(tmp_path / "in", ["a", "b"], 4)
    load = image_folder.read_file

    def spoil(path: Path, origin: str) -> bytes:
        data = load(path, origin)
        path.write_bytes(b"<html>")
        return data

    monkeypatch.setattr(image_folder, "read_file", spoil)
    card = pack.pack(str(source), tmp_path / "out", shard_samples=4, near_duplicates=False)
    monkeypatch.undo()
    verify(tmp_path / "out")
    reader = shards.ShardReader(tmp_path / "out", card, "train")
    for number in range(len(reader)):
        images.open_image(reader.read(number).image, "image")


# ── time ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(22)
def test_a_jpeg_of_endless_scans_is_refused() -> None:
    """Few bytes a scan, a walk over all pixels each: a file of a megabyte would take minutes."""
    out = io.BytesIO()
    Image.new("L", (1600, 1600)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    assert images.decode_image(data, 1).shape == (1, 1600, 1600)
    endless = data[:-2] + last * (MAX_SCANS + 1) + data[-2:]
    with pytest.raises(TesseraError, match="more than 100 scans"):
        images.decode_image(endless, 1)
    decoder = FastDecoder(1, images.MAX_PIXELS)
    assert decoder(memoryview(data)) is not None
    assert decoder(memoryview(endless)) is None
    began = time.process_time()
    Image.open(io.BytesIO(data)).load()
    plain = time.process_time() - began
    began = time.process_time()
    with Image.open(io.BytesIO(data[:-2] + last * 400 + data[-2:])) as image:
        image.load()  # the control
    assert time.process_time() - began > 5 * plain
