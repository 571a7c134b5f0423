"""Torchvision's data sets: files are packed unchanged, and no pickle creates objects."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_sources
from PIL import Image

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import Mask, check
from pipelines.data.images import decode_image
from pipelines.data.importers import torchvision as importer


def test_files_are_read_unchanged(tmp_path: Path) -> None:
    for number in range(4):
        sample_sources.image(tmp_path / ("cat", "dog")[number % 2] / f"{number}.jpg", number)
    source = importer.read(str(tmp_path), {"name": "ImageFolder"})
    assert (source.name, source.task, source.classes) == (
        "ImageFolder",
        "classification",
        ("cat", "dog"),
    )
    assert [(i.origin, i.label) for i in source.items] == [
        ("cat/0.jpg", 0),
        ("cat/2.jpg", 0),
        ("dog/1.jpg", 1),
        ("dog/3.jpg", 1),
    ]
    for item in source.items:
        assert source.load(item) == (tmp_path / item.origin).read_bytes()


def test_arrays_are_read_with_their_splits(tmp_path: Path) -> None:
    sample_sources.write_mnist(tmp_path / "MNIST" / "raw", {"train": 20, "t10k": 10}, packed=False)
    source = importer.read(str(tmp_path), {"name": "MNIST"})
    assert Counter(item.split for item in source.items) == {"train": 20, "test": 10}
    assert source.classes[3] == "3 - three"
    true = np.random.default_rng(1).integers(0, 256, (10, 5, 4), dtype=np.uint8)
    for item in source.items[-10:]:
        pixels = decode_image(source.load(item), 1)[0].numpy()
        np.testing.assert_array_equal(pixels, true[item.row])
        assert item.label == item.row % 10


def test_images_as_targets_are_masks(tmp_path: Path) -> None:
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for number in range(3):
        sample_sources.image(base / "JPEGImages" / f"{number}.jpg", number)
        mask = sample_sources.save(
            base / "SegmentationClass" / f"{number}.png", np.full((24, 32), number + 3, np.uint8)
        )
        with Image.open(mask) as grey:
            palette = grey.copy()
        palette.putpalette(list(range(256)) * 3)
        palette.save(mask)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n")
    (lists / "val.txt").write_text("2\n")
    source = importer.read(str(tmp_path), {"name": "VOCSegmentation"})
    assert source.task == "semantic_segmentation"
    assert [item.split for item in source.items] == ["train", "train", "val"]
    assert source.classes == ("0", "1", "2", "3", "4", "5")
    assert source.annotate is not None
    for number, item in enumerate(source.items):
        result = source.annotate(item)
        assert isinstance(result, Mask)
        check(result, height=24, width=32, classes=6, where="x")
        assert (result.pixels == number + 3).all()
        assert source.load(item) == (base / "JPEGImages" / f"{number}.jpg").read_bytes()


def test_an_unknown_or_missing_data_set_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'CIFAR10'"):
        importer.read(str(tmp_path), {"name": "CIFAR11"})
    with pytest.raises(UsageError, match="unknown data set of torchvision"):
        importer.read(str(tmp_path), {})
    for name in ("CIFAR10", "Flowers102", "SEMEION", "VOCSegmentation", "ImageFolder", "EuroSAT"):
        with pytest.raises(TesseraError, match=rf"^torchvision's {name} in .* can't be opened"):
            importer.read(str(tmp_path / "nowhere"), {"name": name})
    assert not (tmp_path / "nowhere").exists()


def test_targets_of_another_kind_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "VOCdevkit" / "VOC2012"
    sample_sources.image(base / "JPEGImages" / "0.jpg")
    (base / "Annotations").mkdir()
    (base / "Annotations" / "0.xml").write_text(sample_sources.voc_xml([("cat", (1, 1, 2, 2), 0)]))
    (base / "ImageSets" / "Main").mkdir(parents=True)
    (base / "ImageSets" / "Main" / "train.txt").write_text("0\n")
    with pytest.raises(TesseraError, match=r"neither a class nor a mask\. for boxes"):
        importer.read(str(tmp_path), {"name": "VOCDetection"})


def test_a_link_out_of_the_root_is_not_read(tmp_path: Path) -> None:
    secret = sample_sources.image(tmp_path / "secret.jpg")
    sample_sources.image(tmp_path / "set" / "cat" / "0.jpg")
    (tmp_path / "set" / "cat" / "1.jpg").symlink_to(secret)
    source = importer.read(str(tmp_path / "set"), {"name": "ImageFolder"})
    with pytest.raises(TesseraError, match="is outside"):
        source.load(source.items[1])


class _Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


@pytest.mark.fault(13)
def test_a_planted_pickle_does_not_run_even_with_a_valid_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    folder = sample_sources.cifar_python(tmp_path / "cifar-10-batches-py", 0)
    source = importer.read(str(tmp_path), {"name": "CIFAR10"})
    assert (len(source.items), source.classes) == (36, tuple(sample_sources.CIFAR_NAMES))
    pixels, _ = sample_sources.cifar_rows(0)
    result = decode_image(source.load(source.items[0]), 3).numpy()
    np.testing.assert_array_equal(result, pixels[0].reshape(3, 32, 32))

    planted = {"data": _Planted(tmp_path / "marker"), "labels": [1]}
    (folder / "data_batch_4").write_bytes(pickle.dumps(planted, 2))
    importer._make.cache_clear()
    with pytest.raises(TesseraError, match=r"has a pickle that loads \w+\.open: refused"):
        importer.read(str(tmp_path), {"name": "CIFAR10"})
    assert not (tmp_path / "marker").exists()
    with pytest.raises((ValueError, TypeError)):  # the control: it runs, and is no array
        datasets.CIFAR10(str(tmp_path))
    assert (tmp_path / "marker").exists()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    importer._make.cache_clear()
