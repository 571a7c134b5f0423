"""Each data set at hand packs, verifies and is read back, with the counts that its source states."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.data import annotations, shards
from pipelines.data.card import Card
from pipelines.data.importing import pack
from pipelines.data.packing import tally
from pipelines.data.verifying import verify

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def unpack(name: str, to: Path) -> Path:
    archive = DATA / name
    if not archive.exists():
        pytest.skip(f"{archive} is not here")
    with tarfile.open(archive) as tar:
        tar.extractall(to, filter="data")
    return to


def packed(source: Path, to: Path, **options: Any) -> Card:
    card = pack(str(source), to, **options)
    assert not verify(to).differences
    return card


def objects(to: Path, card: Card, split: str) -> int:
    """How many objects are read back."""
    reader = shards.ShardReader(to, card, split)
    found = 0
    for number in range(len(reader)):
        sample = reader.read(number)
        height, width = card.image.max_height, card.image.max_width
        note = annotations.decode_objects(
            sample.note, height=height, width=width, classes=len(card.classes), where=sample.key
        )
        found += len(note.labels)
    return found


def test_bccd_without_the_two_boxes_that_have_no_area(tmp_path: Path) -> None:
    source = unpack("bccd/BCCD.tar", tmp_path) / "BCCD"
    with pytest.raises(tally.Kept, match="2 box without area"):
        pack(str(source), tmp_path / "out")
    card = packed(source, tmp_path / "out", allow_rejected="2")
    assert card.task == "detection"
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open()]
    assert {row["reason"] for row in rows} == {"box without area"}
    assert {row["key"][-5:] for row in rows} == {"00338", "00343"}
    given = {"train": 205, "val": 87, "test": 72}
    left = {name: split.samples for name, split in card.splits.items()}
    assert sum(given.values()) - sum(left.values()) == 2
    assert left["test"] == given["test"]
    assert card.splits["test"].class_counts == {"Platelets": 69, "RBC": 805, "WBC": 71}
    assert objects(tmp_path / "out", card, "test") == 69 + 805 + 71


def test_nuclei_as_coco_and_from_a_mask_for_each(tmp_path: Path) -> None:
    source = unpack("dsb2018-fluorescence/dsb2018-fluorescence.tar.gz", tmp_path / "dsb")
    masks = packed(source, tmp_path / "masks")
    assert masks.task == "instance_segmentation"
    counts = [sum(split.class_counts.values()) for split in masks.splits.values()]
    assert sum(counts) == 6150
    for split in ("train", "val"):
        shutil.copy(DATA / "dsb2018-fluorescence" / f"instances_{split}.json", source)
    coco = packed(source, tmp_path / "coco", format="coco", shard_samples=50)
    assert coco.splits["val"].samples == 50
    assert coco.splits["val"].class_counts == {"nucleus": 1406}
    assert objects(tmp_path / "coco", coco, "val") == 1406
    both = [coco.splits[split].class_counts["nucleus"] for split in ("train", "test")]
    assert sum(both) == 4744


def test_membranes_pixel_by_pixel(tmp_path: Path) -> None:
    source = unpack("isbi-membrane/membrane.tar", tmp_path / "isbi")
    card = packed(source, tmp_path / "out")
    assert card.task == "semantic_segmentation"
    assert sum(split.samples for split in card.splits.values()) == 30
    counts = [sum(split.class_counts.values()) for split in card.splits.values()]
    assert sum(counts) == 30 * 512 * 512
    dark = sum(next(iter(split.class_counts.values())) for split in card.splits.values())
    assert round(dark / sum(counts), 3) == 0.220


def test_photos_without_labels_shrunk_on_the_way(tmp_path: Path) -> None:
    source = unpack("sr-bsd68-set5/CBSD68.tar", tmp_path / "bsd")
    whole = packed(source, tmp_path / "whole", format="images")
    assert (whole.task, whole.classes) == ("images", ())
    assert sum(split.samples for split in whole.splits.values()) == 68
    assert (whole.image.min_height, whole.image.max_width) == (321, 481)
    small = packed(source, tmp_path / "small", format="images", resize=160, quality=90)
    assert (small.image.min_height, small.image.max_width) == (160, 240)
    sizes = [
        sum(shard.size_bytes for split in card.splits.values() for shard in split.shards)
        for card in (whole, small)
    ]
    assert sizes[1] < sizes[0] / 10
    assert small.digest != whole.digest


@pytest.mark.slow
def test_mnist_has_each_digit_as_often_as_stated(tmp_path: Path) -> None:
    source = DATA / "mnist"
    if not source.exists():
        pytest.skip(f"{source} is not here")
    card = packed(source, tmp_path / "out")
    train, val, test = (
        list(card.splits[s].class_counts.values()) for s in ("train", "val", "test")
    )
    assert [a + b for a, b in zip(train, val)] == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert test == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert card.rejected == 0


@pytest.mark.slow
def test_cifar10_has_all_its_images(tmp_path: Path) -> None:
    source = unpack("cifar10-jpeg/cifar10-jpeg.tar.gz", tmp_path / "cifar")
    card = packed(source, tmp_path / "out")
    assert {name: split.samples for name, split in card.splits.items()} == {
        "train": 45000,
        "val": 5000,
        "test": 10000,
    }
    assert set(card.splits["test"].class_counts.values()) == {1000}
    assert card.rejected == 0
    assert card.leakage.near > 0, "CIFAR-10 is known for near duplicates across its splits"
