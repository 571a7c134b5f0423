"""Malicious data sets and sources, with valid digests and checksums."""

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
from pipelines.data.image_reading import MAX_PIXELS
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
    differences = inspection_verify.verify(folder, workers=1).differences
    if differences:
        raise TesseraError(differences[0])


def plan(folder: Path) -> None:
    preflight.check_feedable(cards.read(folder), workers=1, batch_size=2, where=folder)


def train(folder: Path) -> None:
    card = cards.read(folder)
    loader = TrainLoader(folder, card, card.spec(), batch_size=2, seed=0, world=World(0, 1))
    assert sum(step.counted for step in loader.epoch(0)) == card.split("train").samples


READERS = (inspect, verify, plan, train)


# ── cards ─────────────────────────────────────────────────────────────────────────────────────

SHARD = ("splits", "train", "shards", 0)
FORGED: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "a negative number of samples": ((*SHARD, "samples"), -3),
    "10^9 samples": ((*SHARD, "samples"), 10**9),
    "a shard of 2^70 bytes": ((*SHARD, "size_bytes"), 1 << 70),
    "0 channels": (("image", "channels"), 0),
    "a height of 0": (("image", "max_height"), 0),
    "a height of 10^12": (("image", "max_height"), 10**12),
    "no mean": (("image", "mean"), []),
    "an infinite std": (("image", "std"), [1e999]),
    "another task": (("task",), "run"),
    "no classes": (("classes",), []),
    "fewer classes": (("classes",), ["a", "b"]),
    "a class twice": (("classes",), ["a", "a", "c"]),
    "unknown class in the counts": (("splits", "train", "class_counts"), {"z": 1}),
    "no splits": (("splits",), {}),
    "another version": (("version",), 99),
    "a path outside the folder": ((*SHARD, "path"), "../../etc/passwd"),
    "the folder itself as path": ((*SHARD, "path"), "."),
    "a folder as shard": ((*SHARD, "path"), "train"),
    "a terminal escape in a path": ((*SHARD, "path"), f"train/{ESCAPE}.tar"),
    "a pipe as root": (("root",), "pipe:touch marker"),
    "a folder as index": (("splits", "train", "index"), "train"),
}


def forge(folder: Path, keys: tuple[str | int, ...], value: Any) -> None:
    """Sets one field of the card, and updates the digest to match."""
    tree: Any = json.loads((folder / "card.json").read_text())
    node = tree
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    with suppress(ValueError):  # an invalid card needs no digest
        tree["digest"] = Card.model_validate(tree).content_digest()
    (folder / "card.json").write_text(json.dumps(tree))


@pytest.mark.fault(10, 12, 14, 30)
@pytest.mark.parametrize("name", FORGED)
def test_a_forged_card_raises_a_tessera_error(
    name: str, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least one of the readers raises it. None of them raises another error, hangs, or runs
    code."""
    folder, _ = make_set(6, shard_samples=3)
    monkeypatch.chdir(folder)
    for reader in READERS:
        reader(folder)
    forge(folder, *FORGED[name])
    messages = []
    for reader in READERS:
        try:
            reader(folder)
        except TesseraError as error:
            messages.append(str(error))
    assert messages
    assert all(line.isprintable() for line in messages), messages
    assert not (folder / "marker").exists()


def test_a_std_of_zero_is_replaced_by_one(tmp_path: Path) -> None:
    """Images of one colour have a std of 0; pixels are divided by it."""
    white = Image.new("L", (4, 4), 255)
    card = pack_set(tmp_path, "images", {"train": [("a", white, None)]})
    flat = card.image.model_copy(update={"std": (0.0,)})
    assert card.model_copy(update={"image": flat}).spec().std == (1.0,)


def test_an_image_size_that_exceeds_memory_is_refused(make_set: MakeSet) -> None:
    _, card = make_set(3)
    with pytest.raises(TesseraError, match=r"too large.*data\.height"):
        card.spec(20_000, 20_000)


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("where", "root", "allowed"),
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
def test_a_remote_card_cannot_redirect_a_reader(where: str, root: str, allowed: bool) -> None:
    """Only a card in a local folder may name any location for its shards."""
    if allowed:
        assert open_shards(where, root).where == root
        return
    with pytest.raises(TesseraError, match="says that its shards are in"):
        open_shards(where, root)
    open_storage(root)  # control: the user may open the same address


@pytest.mark.slow
@pytest.mark.fault(12)
def test_a_card_of_50_000_shards_is_read_within_10_seconds(make_set: MakeSet) -> None:
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
    """Changes the index rows of train, and updates all checksums to match."""
    card = cards.read(folder)
    split = card.splits["train"]
    rows = np.load(folder / split.index)
    change(rows)
    starts = np.cumsum([0, *(shard.samples for shard in split.shards)])
    tables = [rows[start:end] for start, end in pairwise(starts)]
    sums, size, sha256 = index.write_index(folder / split.index, tables)
    updated = tuple(s.model_copy(update={"rows_sha256": x}) for s, x in zip(split.shards, sums))
    update = {"shards": updated, "index_bytes": size, "index_sha256": sha256}
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
    ("change", "message"),
    [
        (swap, "its samples overlap"),
        (relabel, "its class differs from the index"),
        (steer, "a key with characters that are not allowed"),
    ],
)
def test_verify_detects_wrong_index_rows_with_valid_checksums(
    change: Callable[[Any], None], message: str, make_set: MakeSet
) -> None:
    folder, _ = make_set(6, shard_samples=3)
    reindex(folder, lambda rows: None)
    verify(folder)
    reindex(folder, change)
    with pytest.raises(TesseraError, match=message):
        verify(folder)
    if change is steer:
        with pytest.raises(TesseraError, match=message):
            train(folder)


# ── printed output ────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(10)
def test_errors_and_json_output_contain_no_terminal_escapes() -> None:
    error = TesseraError(f"{ESCAPE}a\u202eb\udcff\x9b", hint="\x07")
    assert str(error) == r"\x1b[2Ja\u202eb\udcff\x9b. \x07"
    assert str(TesseraError("one\ntwo é")) == "one\ntwo é"
    value = {"path": os.fsdecode(b"\xff.png"), "class": f"é{ESCAPE}\x9b\U000e0001"}
    line = json_line(value)
    assert line.isprintable()
    assert "é" in line
    assert json.loads(line) == value
    plain = json.dumps(value, ensure_ascii=False)  # control
    assert not plain.isprintable()
    with pytest.raises(UnicodeEncodeError):
        plain.encode()


# ── not regular files ─────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(11)
@pytest.mark.parametrize("name", ["card.json", "train/index.npy", "train/000000.tar"])
def test_a_pipe_in_a_data_set_is_refused_without_blocking(name: str, make_set: MakeSet) -> None:
    folder, _ = make_set(6, shard_samples=3)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for reader in READERS:
        with pytest.raises(TesseraError, match=r"missing|has no card\.json"):
            reader(folder)


@pytest.mark.slow
@pytest.mark.control(11)
def test_opening_a_pipe_without_the_check_blocks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    program = [sys.executable, "-c", f"open({str(tmp_path / 'pipe')!r}, 'rb')"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(program, timeout=3)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_parent(path: Path) -> None:
    path.symlink_to(path.parent.parent)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.fault(11)
@pytest.mark.parametrize("make", [os.mkfifo, link_to_itself, link_to_parent, link_to_zeros])
def test_files_that_are_not_regular_are_named_and_never_read(
    make: Callable[[Path], None], tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "in", ["a", "b"], 4)
    make(source / "a" / "x.jpg")
    with pytest.raises(TesseraError, match=r"1 special file: .*: a/x\.jpg"):
        pack.pack(str(source), tmp_path / "out")
    card = pack.pack(str(source), tmp_path / "out", allow_unused=["a/x.jpg"])
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
    with pytest.raises(TesseraError, match=r"special file: pipe.*masks/0\.png"):
        pack.pack(str(tmp_path / "masks"), tmp_path / "out", format="masks")


@pytest.mark.fault(10, 11)
def test_csv_paths_outside_the_source_are_refused(tmp_path: Path) -> None:
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
def test_a_file_changed_during_packing_is_packed_as_first_read(
    tmp_path: Path, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that were checked are the bytes that are written."""
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
@pytest.mark.slow
def test_a_jpeg_with_too_many_scans_is_refused() -> None:
    """A scan takes few bytes, and a decoder visits all pixels for each: a file of 1 MB would take
    minutes."""
    out = io.BytesIO()
    Image.new("L", (1600, 1600)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    assert images.decode_image(data, 1).shape == (1, 1600, 1600)
    endless = data[:-2] + last * (MAX_SCANS + 1) + data[-2:]
    with pytest.raises(TesseraError, match="more than 100 scans"):
        images.decode_image(endless, 1)
    decoder = FastDecoder(1, MAX_PIXELS)
    assert decoder(memoryview(data)) is not None
    assert decoder(memoryview(endless)) is None
    began = time.process_time()
    Image.open(io.BytesIO(data)).load()
    plain = time.process_time() - began
    began = time.process_time()
    with Image.open(io.BytesIO(data[:-2] + last * 400 + data[-2:])) as image:
        image.load()  # control
    assert time.process_time() - began > 5 * plain
