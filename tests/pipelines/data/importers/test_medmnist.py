"""MedMNIST's arrays: read from their headers, and never unpickled."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_sources

from models.core.errors import TesseraError
from pipelines.data.images import decode_image
from pipelines.data.importers import medmnist


def test_medmnist_is_read(tmp_path: Path) -> None:
    folder = sample_sources.medmnist(tmp_path / "set")
    for path in (folder, folder / "pathmnist.npz"):
        assert medmnist.recognises(str(path)) == "train images and labels in pathmnist.npz"
        source = medmnist.read(str(path), {})
        assert (source.name, source.classes) == ("pathmnist", ("0", "1", "2", "3"))
        assert Counter(item.split for item in source.items) == {"train": 12, "val": 4, "test": 5}
    true = np.load(folder / "pathmnist.npz")
    for item in source.items:
        pixels = decode_image(source.load(item), 3).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, true[f"{item.split}_images"][item.row])
        assert item.label == true[f"{item.split}_labels"][item.row, 0]


def test_grey_and_fortran_arrays_are_read(tmp_path: Path) -> None:
    grey = np.asfortranarray(np.random.default_rng(0).integers(0, 256, (4, 28, 20), np.uint8))
    folder = sample_sources.medmnist(tmp_path / "set", val_images=grey)
    source = medmnist.read(str(folder), {})
    for item in [item for item in source.items if item.split == "val"]:
        pixels = decode_image(source.load(item), 1)[0].numpy()
        np.testing.assert_array_equal(pixels, grey[item.row])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_labels": np.zeros((12, 14), np.uint8)}, "14 labels an image: only one"),
        ({"train_images": np.zeros((12, 28, 28, 28), np.uint8)}, "volumes are not supported"),
        ({"train_images": np.zeros((12, 28, 28), np.float32)}, "is float32 of shape"),
        ({"train_labels": np.zeros((12, 1), np.float32)}, "not labels"),
        ({"train_labels": np.zeros(11, np.uint8)}, "12 train_images and 11 train_labels"),
        ({"train_labels": np.full(12, -1, np.int64)}, "labels from -1 to -1"),
        ({"train_labels": np.full(12, 10**12)}, "labels from 1000000000000"),
        ({"train_labels": np.array([None] * 12)}, "array of object"),
        ({"train_images": np.zeros((12, 0, 28), np.uint8)}, "not images"),
    ],
)
def test_data_sets_of_another_kind_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    folder = sample_sources.medmnist(tmp_path / "set", "chestmnist", **arrays)
    with pytest.raises(TesseraError, match=message):
        medmnist.read(str(folder), {})


def npz(folder: Path, arrays: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return folder


def npy(array: np.ndarray, **header: Any) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": "|u1", "fortran_order": False, "shape": array.shape, **header}
    )
    return out.getvalue() + array.tobytes()


@pytest.mark.fault(12)
def test_false_sizes_and_bombs_are_refused_before_they_are_read(tmp_path: Path) -> None:
    labels = npy(np.zeros(2, np.uint8))
    small = np.zeros((2, 8, 8), np.uint8)
    claims = {
        "claims": npy(small, shape=(50_000, 1000, 1000)),
        "another number": npy(small, shape=(2, 8, 9)),
        "refused": npy(small, shape=(2, 100_000, 100_000)),
        "can't be read|refused": npy(small, shape=(-2, 8, 8)),
        "can't be read": b"\x93NUMPY\x01\x00v\x00{'descr': '|u1'}",
    }
    for number, (message, data) in enumerate(claims.items()):
        folder = npz(tmp_path / str(number), {"train_images": data, "train_labels": labels})
        with pytest.raises(TesseraError, match=message):
            medmnist.read(str(folder), {})
    bomb = npy(np.zeros((2, 5000, 5000), np.uint8))
    folder = npz(tmp_path / "bomb", {"train_images": bomb, "train_labels": labels})
    assert (folder / "x.npz").stat().st_size < 100_000
    with pytest.raises(TesseraError, match="decompresses to over 100 times"):
        medmnist.read(str(folder), {})
    with np.load(folder / "x.npz") as loaded:  # the control: NumPy unfolds it
        assert loaded["train_images"].nbytes == 50_000_000


class _Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


@pytest.mark.fault(13)
def test_a_planted_pickle_in_an_array_is_not_unpickled(tmp_path: Path) -> None:
    array = np.array([_Planted(tmp_path / "marker")] * 12)
    folder = sample_sources.medmnist(tmp_path / "set", train_labels=array)
    with pytest.raises(TesseraError, match="array of object"):
        medmnist.read(str(folder), {})
    assert not (tmp_path / "marker").exists()
    with np.load(folder / "pathmnist.npz", allow_pickle=True) as loaded:  # the control
        for opened in loaded["train_labels"]:
            opened.close()
    assert (tmp_path / "marker").exists()
