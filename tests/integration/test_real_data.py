"""Each real data set, or a tenth of a large one, is packed, verified, inspected and read; the
counts are those of its SOURCE.md."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jobs import inspect, pack, verify
from models.core.errors import TesseraError
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.data.importers import mnist
from pipelines.data.loading.loaders import EvalLoader
from pipelines.interfaces import World

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
DATA = Path(__file__).parents[3] / "shared" / "data"


def unpack(
    name: str, archive: str, to: Path, wanted: Callable[[str], bool] = lambda member: True
) -> Path:
    """The folder of an archive, or only the `wanted` files. Skips the test without the data."""
    path = DATA / name / archive
    if not path.is_file():
        pytest.skip(f"the data set {name} is not here")
    with tarfile.open(path) as tar:
        chosen = (member for member in tar if wanted(member.name))
        tar.extractall(to / name, chosen, filter="data")
    return to / name


def call(command: object, *arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, standalone_mode=False, catch_exceptions=False)  # type: ignore[arg-type]
    assert not result.exception
    return str(result.stdout)


def go_through(source: Path, folder: Path, *options: str) -> Card:
    """Packs, verifies, writes the page, and reads every sample."""
    call(pack.command, str(source), "--to", str(folder), "--workers", "0", *options)
    check_account(source, folder)
    assert json.loads(call(verify.command, str(folder), "--json"))["differences"] == []
    page = folder.with_suffix(".html")
    call(inspect.command, str(folder), "--html", str(page))
    card = cards.read(folder)
    assert card.name in page.read_text()
    spec = card.spec(32, 32)
    for split, held in card.splits.items():
        loader = EvalLoader(
            folder, card, spec, batch_size=256, world=World(), split=split, cache="none"
        )
        read = [index for _, batch in loader.batches() for index in batch["index"].tolist()]
        assert read == list(range(held.samples))
    return card


def check_account(source: Path, folder: Path) -> None:
    """Every file of the source is in the account."""
    account = json.loads((folder / "account.json").read_text())
    parts = account["images"] + account["labels"] + account["documents"] + account["allowed"]
    assert parts + sum(account["others"].values()) == account["files"]
    if source.is_dir():
        assert account["files"] == sum(len(files) for _, _, files in os.walk(source))


def samples(card: Card) -> dict[str, int]:
    return {name: split.samples for name, split in card.splits.items()}


def counts(card: Card, *splits: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for name in splits or card.splits:
        total.update(card.split(name).class_counts)
    return total


def test_bccd(tmp_path: Path) -> None:
    source = unpack("bccd", "BCCD.tar", tmp_path) / "BCCD"
    refused = CliRunner().invoke(
        pack.command, [str(source), "--to", str(tmp_path / "out")], standalone_mode=False
    )
    message = str(refused.exception)
    assert "2 of 364 images can't be packed, 0 are allowed (box without area: 2)" in message
    assert "BloodImage_00338" in message
    assert "BloodImage_00343" in message
    card = go_through(source, tmp_path / "out", "--allow-rejected", "2")
    lost = {"train": 0, "val": 0, "test": 0}
    assert counts(card, "test") == {"Platelets": 69, "RBC": 805, "WBC": 71}
    rows = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert {row["key"].split("/")[-1] for row in rows} == {"BloodImage_00338", "BloodImage_00343"}
    for split in lost:
        names = (source / f"ImageSets/Main/{split}.txt").read_text().split()
        lost[split] = len({row["key"].split("/")[-1] for row in rows} & set(names))
    assert samples(card) == {n: c - lost[n] for n, c in (("train", 205), ("val", 87), ("test", 72))}
    assert card.task == "detection"
    # Of 4,888 boxes those of the two images are gone.
    assert {row["reason"] for row in rows} == {"box without area"}
    gone = sum(
        (source / "Annotations" / f"{row['key'].split('/')[-1]}.xml").read_text().count("<object>")
        for row in rows
    )
    assert counts(card).total() == 4888 - gone


def test_nuclei_from_coco_and_from_masks(tmp_path: Path) -> None:
    source = unpack("dsb2018-fluorescence", "dsb2018-fluorescence.tar.gz", tmp_path)
    one = go_through(source, tmp_path / "masks", "--format", "instance_masks")
    assert sum(samples(one).values()) == 220
    assert counts(one).total() == 6150
    for split in ("train", "val"):
        (source / f"instances_{split}.json").write_bytes(
            (DATA / "dsb2018-fluorescence" / f"instances_{split}.json").read_bytes()
        )
    options = ("--format", "coco", "--workers", "0", "--no-leakage-check")
    with pytest.raises(TesseraError, match=r"6,150 \.png in stage1_train/\*/masks"):
        call(pack.command, str(source), "--to", str(tmp_path / "coco"), *options)
    options += ("--allow-unused", "stage1_train/*/masks/*.png")
    call(pack.command, str(source), "--to", str(tmp_path / "coco"), *options)
    two = cards.read(tmp_path / "coco")
    assert samples(two)["val"] == 50
    assert samples(two)["train"] + samples(two)["test"] == 170
    assert counts(two, "val").total() == 1406
    assert counts(two, "train", "test").total() == 4744
    assert one.task == two.task == "instance_segmentation"


def test_membranes(tmp_path: Path) -> None:
    source = unpack("isbi-membrane", "membrane.tar", tmp_path)
    card = go_through(source / "membrane", tmp_path / "out")
    assert sum(samples(card).values()) == 30
    assert card.task == "semantic_segmentation"
    pixels = counts(card)
    assert pixels.total() == 30 * 512 * 512
    assert round(pixels["foreground"] / pixels.total(), 3) == 0.780


@pytest.mark.parametrize(("archive", "count"), [("CBSD68.tar", 68), ("Set5.tar", 5)])
def test_images_without_labels(tmp_path: Path, archive: str, count: int) -> None:
    source = unpack("sr-bsd68-set5", archive, tmp_path)
    card = go_through(source, tmp_path / "out")
    assert sum(samples(card).values()) == count
    assert card.task == "images"
    assert card.classes == ()


def test_photos_are_shrunk_while_packing(tmp_path: Path) -> None:
    source = unpack("sr-bsd68-set5", "CBSD68.tar", tmp_path)
    small = go_through(source, tmp_path / "small", "--resize", "160", "--quality", "90")
    assert (small.image.min_height, small.image.max_width) == (160, 240)
    size_bytes = sum(s.size_bytes for split in small.splits.values() for s in split.shards)
    assert size_bytes < (DATA / "sr-bsd68-set5" / "CBSD68.tar").stat().st_size / 10


def test_mnist(tmp_path: Path) -> None:
    """Every label is read; a tenth of the images is packed, as idx files of the same form."""
    if not (DATA / "mnist").is_dir():
        pytest.skip("the data set mnist is not here")
    labels: dict[str, Counter[int | None]] = {"train": Counter(), "test": Counter()}
    for item in mnist.read(str(DATA / "mnist"), {}).items:
        labels[item.split or ""][item.label] += 1
    assert [labels["train"][label] for label in range(10)] == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert [labels["test"][label] for label in range(10)] == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    (tmp_path / "tenth").mkdir()
    expected = {}
    for split in ("train", "t10k"):
        for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
            name = f"{split}-{kind}-ubyte.gz"
            head, values = read_idx(DATA / "mnist" / name, dimensions)
            tenth = values[::10]
            head = head[:4] + len(tenth).to_bytes(4, "big") + head[8:]
            (tmp_path / "tenth" / name).write_bytes(gzip.compress(head + tenth.tobytes(), 1))
        expected[split] = np.bincount(tenth, minlength=10).tolist()
    card = go_through(tmp_path / "tenth", tmp_path / "out")
    assert samples(card)["train"] + samples(card)["val"] == 6_000
    assert list(counts(card, "train", "val").values()) == expected["train"]
    assert list(counts(card, "test").values()) == expected["t10k"]


def read_idx(path: Path, dimensions: int) -> tuple[bytes, np.ndarray]:
    data = gzip.decompress(path.read_bytes())
    size = 4 + 4 * dimensions
    shape = np.frombuffer(data, ">u4", dimensions, 4)
    return data[:size], np.frombuffer(data, np.uint8, offset=size).reshape(shape)


def test_cifar10(tmp_path: Path) -> None:
    """A tenth of each class and split."""

    def wanted(member: str) -> bool:
        return member.endswith("0.jpg")

    source = unpack("cifar10-jpeg", "cifar10-jpeg.tar.gz", tmp_path, wanted)
    card = go_through(source, tmp_path / "out")
    assert set(counts(card, "train", "val").values()) == {500}
    assert set(counts(card, "test").values()) == {100}
    assert len(card.classes) == 10
    assert card.leakage.near > 0, "CIFAR-10 is known for near duplicates across its splits"


def test_grocery_fruit(tmp_path: Path) -> None:
    source = unpack("grocery-fruit", "grocery-fruit.tar", tmp_path)
    card = go_through(source, tmp_path / "out", "--resize", "32", "--allow-rejected", "1%")
    assert len(card.classes) == 28
    packed = samples(card)
    assert packed["train"] <= 1142
    assert packed["val"] <= 111
    assert sum(packed.values()) + card.rejected == 1142 + 111 + 1117
