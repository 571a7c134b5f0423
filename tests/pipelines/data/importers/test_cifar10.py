"""CIFAR's batches: nothing is unpickled, and every pixel is at its position."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_sources

from models.core.errors import TesseraError, UsageError
from pipelines.data.images import decode_image
from pipelines.data.importers import cifar10
from pipelines.data.packing.pack import pack
from pipelines.data.sources import Source


def check_rows(source: Source) -> None:
    """Every image and label equals that of `sample_sources.cifar_rows`."""
    assert Counter(item.split for item in source.items) == {"train": 30, "test": 6}
    assert len({item.key for item in source.items}) == 36
    for at, item in enumerate(source.items):
        pixels, labels = sample_sources.cifar_rows(at // 6)
        true = pixels[at % 6].reshape(3, 32, 32)
        np.testing.assert_array_equal(decode_image(source.load(item), 3).numpy(), true)
        assert item.label == labels[at % 6]


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("around", ["", "cifar-10-batches-py"])
def test_the_python_version_is_read(tmp_path: Path, protocol: int, around: str) -> None:
    """0 is the format of Python 2, which the official files have."""
    sample_sources.cifar_python(tmp_path / "set" / around, protocol)
    assert cifar10.recognises(str(tmp_path / "set"))
    source = cifar10.read(str(tmp_path / "set"), {})
    assert source.classes == tuple(sample_sources.CIFAR_NAMES)
    check_rows(source)


def test_the_generated_batch_is_a_valid_pickle(tmp_path: Path) -> None:
    """Control: the bytes generated as by Python 2 are a pickle of that array."""
    pixels, labels = sample_sources.cifar_rows(0)
    result = pickle.loads(sample_sources.python2_pickle(pixels, labels), encoding="latin1")
    np.testing.assert_array_equal(result["data"], pixels)
    assert result["labels"] == labels


def test_the_binary_version_is_read(tmp_path: Path) -> None:
    sample_sources.cifar_binary(tmp_path / "set")
    assert cifar10.recognises(str(tmp_path / "set"))
    source = cifar10.read(str(tmp_path / "set"), {})
    assert source.classes == tuple(sample_sources.CIFAR_NAMES)
    check_rows(source)


@pytest.mark.parametrize("binary", [True, False])
def test_cifar_100_has_fine_and_coarse_labels(tmp_path: Path, binary: bool) -> None:
    names = {"fine": [f"f{n}" for n in range(10)], "coarse": [f"c{n}" for n in range(10)]}
    fine: list[int] = []
    for seed, split in enumerate(("train", "test")):
        pixels, labels = sample_sources.cifar_rows(seed)
        fine += labels
        coarse = [9 - label for label in labels]
        if binary:
            rows = np.concatenate([np.array([coarse, labels], np.uint8).T, pixels], axis=1)
            (tmp_path / f"{split}.bin").write_bytes(rows.tobytes())
        else:
            batch = {"data": pixels, "fine_labels": labels, "coarse_labels": coarse}
            (tmp_path / split).write_bytes(pickle.dumps(batch, 2))
    if binary:
        for kind, words in names.items():
            (tmp_path / f"{kind}_label_names.txt").write_text("\n".join(words))
    else:
        meta = {f"{kind}_label_names": words for kind, words in names.items()}
        (tmp_path / "meta").write_bytes(pickle.dumps(meta, 2))
    assert cifar10.recognises(str(tmp_path))
    source = cifar10.read(str(tmp_path), {})
    assert (source.classes, [i.label for i in source.items]) == (tuple(names["fine"]), fine)
    source = cifar10.read(str(tmp_path), {"labels": "coarse"})
    assert source.classes == tuple(names["coarse"])
    assert [item.label for item in source.items] == [9 - label for label in fine]
    with pytest.raises(UsageError, match="labels can't be 'medium'"):
        cifar10.read(str(tmp_path), {"labels": "medium"})


class _Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


@pytest.mark.fault(13)
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_planted_pickle_does_not_run(tmp_path: Path, protocol: int, name: str) -> None:
    folder = sample_sources.cifar_python(tmp_path / "set")
    planted = pickle.dumps({b"data": _Planted(tmp_path / "marker"), b"labels": []}, protocol)
    (folder / name).write_bytes(planted)
    with pytest.raises(TesseraError, match=rf"^{name} is not a pickle of plain values.*uses"):
        cifar10.read(str(folder), {})
    assert not (tmp_path / "marker").exists()
    pickle.loads(planted)[b"data"].close()  # the control
    assert (tmp_path / "marker").exists()


def test_damaged_and_missing_files_are_reported(tmp_path: Path) -> None:
    folder = sample_sources.cifar_python(tmp_path / "py")
    data = (folder / "data_batch_2").read_bytes()
    cases = [b"", data[:-1], data[:5000], b"<html>", b"\x80\x02].", pickle.dumps({"labels": [1]})]
    for case in cases:
        (folder / "data_batch_2").write_bytes(case)
        with pytest.raises(TesseraError, match=r"^data_batch_2 "):
            cifar10.read(str(folder), {})
    (folder / "data_batch_2").unlink()
    with pytest.raises(TesseraError, match="has no data_batch_2"):
        cifar10.read(str(folder), {})
    folder = sample_sources.cifar_binary(tmp_path / "bin")
    path = folder / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TesseraError, match=r"^test_batch\.bin .*not a multiple of 3073"):
        cifar10.read(str(folder), {})
    path.write_bytes(b"\xff" * 3073)
    with pytest.raises(TesseraError, match="labels from 255 to 255, there are 10"):
        cifar10.read(str(folder), {})


def test_labels_and_pixels_must_agree(tmp_path: Path) -> None:
    folder = sample_sources.cifar_python(tmp_path / "py")
    pixels, labels = sample_sources.cifar_rows(0)
    cases: list[tuple[Any, Any, str]] = [
        (pixels, labels[1:], "6 images and 5 labels"),
        (pixels, [*labels[1:], "a"], "no list of labels"),
        (pixels, [*labels[1:], True], "no list of labels"),
        (pixels[:, 1:], labels, "no `data` with 3072"),
        (pixels.astype(np.int64), labels, "another dtype than uint8"),
        ([1, 2], labels, "no `data` with 3072"),
        (pixels, [*labels[1:], 10], "labels from"),
    ]
    for data, numbers, message in cases:
        batch = pickle.dumps({"data": data, "labels": numbers}, 2)
        (folder / "data_batch_1").write_bytes(batch)
        with pytest.raises(TesseraError, match=f"^data_batch_1 .*{message}"):
            cifar10.read(str(folder), {})


@pytest.mark.parametrize(
    ("name", "make", "digest"),
    [
        (
            "cifar",
            sample_sources.cifar_python,
            "7162f8d66cafc1c7d3f259fa5772fe897f0541c9f4d08dddf207c325c1137c25",
        ),
        (
            "cifarb",
            sample_sources.cifar_binary,
            "81d8a2d2905bea87e2d27b9d6495648286a7a8ce5dc37076e463fd49a8543231",
        ),
    ],
)
def test_a_pack_keeps_its_digest(
    tmp_path: Path, name: str, make: Callable[[Path], Path], digest: str
) -> None:
    """The digests that commit 23d2f4f gives: measured results name them."""
    card = pack(str(make(tmp_path / name)), tmp_path / "out")
    assert card.digest == digest
    other = pack(str(tmp_path / name), tmp_path / "other", seed=1)
    assert other.digest != digest  # the control: another cut
