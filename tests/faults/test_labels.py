"""Invalid labels, and libraries that train on them without a warning."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import fresh_process
import numpy as np
import pytest
import torch
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data.packing import pack
from pipelines.data.shards import ShardReader

ROOT = Path(__file__).parents[2]
MakeFolder = Callable[..., Path]

DETECTOR = """
import sys, torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
torch.manual_seed(0)
network = fasterrcnn_mobilenet_v3_large_320_fpn(
    weights=None, weights_backbone=None, num_classes=3
).train()
for right, label in (("9", 1), ("nan", 1), ("9", -1), ("inf", 1)):
    boxes = torch.tensor([[1.0, 2.0, float(right), 9.0]])
    target = {"boxes": boxes, "labels": torch.tensor([label])}
    losses = network([torch.rand(3, 32, 32)], [target])
    print(right, label, bool(torch.isfinite(sum(losses.values()))), flush=True)
"""


@pytest.mark.slow
@pytest.mark.control(26, 27)
def test_torchvision_trains_on_nan_and_label_minus_1_and_crashes_on_infinity() -> None:
    """Therefore each box and label is checked when it is packed, and again when it is read."""
    done = fresh_process.run(DETECTOR)
    assert done.stdout.decode().splitlines() == ["9 1 True", "nan 1 False", "9 -1 True"]
    assert done.returncode < 0, "the process must end by a signal"


@pytest.mark.control(27)
def test_cross_entropy_ignores_the_label_minus_100() -> None:
    scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, -100])
    loss = torch.nn.functional.cross_entropy
    assert loss(scores, labels) == loss(scores[:3], labels[:3])


@pytest.mark.control(29)
def test_stock_webdataset_drops_a_sample_without_a_label(tmp_path: Path) -> None:
    import webdataset as library

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "a.cls", "b.png", "c.png", "c.cls"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    dataset = library.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    pairs = dataset.to_tuple("__key__", "cls", handler=library.ignore_and_continue)
    assert [key for key, _ in pairs] == ["a", "c"]


@pytest.mark.control(30)
def test_torchvision_imagefolder_numbers_classes_per_split(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    """The same class has different indices in train and val, without a warning."""
    from torchvision.datasets import ImageFolder

    make_folder(tmp_path, ["train/ant", "train/bee", "train/cat", "val/bee", "val/cat"], 3)
    train, val = (ImageFolder(str(tmp_path / split)).class_to_idx for split in ("train", "val"))
    assert (train["bee"], val["bee"]) == (1, 0)
    card = pack.pack(str(tmp_path), tmp_path / "out")
    reader = ShardReader(tmp_path / "out", card, "val")
    stored = [reader.read(number) for number in range(len(reader))]
    assert {card.classes[s.label] for s in stored if "bee" in s.key} == {"bee"}


@pytest.mark.fault(30)
def test_a_single_class_needs_an_explicit_format(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "in", ["cat"])
    card = pack.pack(str(source), tmp_path / "by-default")
    assert (card.task, card.classes) == ("images", ())
    card = pack.pack(str(source), tmp_path / "explicit", format="image_folder")
    assert (card.task, card.classes) == ("classification", ("cat",))


@pytest.mark.fault(30)
def test_two_unicode_forms_of_one_class_name_are_one_class(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    """An accented letter can be one character or two; both look the same."""
    names = ["caf\u00e9", "cafe\u0301", "tea"]
    source = make_folder(tmp_path / "in", names, 10)
    assert len(os.listdir(source)) == 3, "without the check, three folders are three classes"
    card = pack.pack(str(source), tmp_path / "out")
    assert card.classes == ("caf\u00e9", "tea")
    assert sum(split.class_counts["caf\u00e9"] for split in card.splits.values()) == 20


@pytest.mark.control(31)
def test_file_digests_miss_a_copy_in_another_format_and_pack_refuses_it(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    import hashlib

    source = make_folder(tmp_path / "in", ["train/ant", "train/bee", "test/ant", "test/bee"], 4)
    image = Image.open(source / "train/ant/000.jpg")
    image.save(source / "test/ant/copy.png")
    files = [path.read_bytes() for path in source.rglob("*.*")]
    assert len({hashlib.sha256(data).digest() for data in files}) == len(files)
    with pytest.raises(TesseraError, match="image in two splits"):
        pack.pack(str(source), tmp_path / "out")
    assert np.array_equal(Image.open(source / "test/ant/copy.png"), image)
