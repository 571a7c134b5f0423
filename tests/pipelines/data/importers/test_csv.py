"""A CSV file, images without labels, and MedMNIST's arrays."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_sources as made

from models.core.errors import TesseraError, UsageError
from pipelines.data.images import decode_image
from pipelines.data.importers import csv, images, medmnist


def test_a_table_is_read(tmp_path: Path) -> None:
    folder = made.table(tmp_path / "set")
    assert csv.recognises(str(folder)) == "paths and labels in labels.csv"
    for source in (csv.read(str(folder), {}), csv.read(str(folder / "labels.csv"), {})):
        assert (source.name, source.task, source.classes) == (
            "set",
            "classification",
            ("cat", "dog"),
        )
        assert [item.label for item in source.items] == [0, 1, 0, 1, 0, 1]
        assert [item.split for item in source.items] == ["train", "val", None] * 2
        assert source.items[1].key == "photos/1"
        assert source.load(source.items[1]) == (folder / "photos" / "1.jpg").read_bytes()
        assert [path.name for path in source.files(source.items[1])] == ["1.jpg", "labels.csv"]


@pytest.mark.fault(8, 29)
def test_rows_with_a_fault_can_t_be_packed(tmp_path: Path) -> None:
    folder = made.table(tmp_path / "set")
    made.image(tmp_path / "secret.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    rows = [
        ("photos/0.jpg,cat,train", ""),
        ("photos/9.jpg,cat,train", "missing image"),
        ("../secret.jpg,cat,train", "path outside the source"),
        (f"{tmp_path}/secret.jpg,cat,train", "path outside the source"),
        ("photos/../../secret.jpg,cat,train", "path outside the source"),
        ("photos/1.jpg,,train", "missing label"),
        ("photos/2.jpg,cat,dev", "unknown split"),
        (",cat,train", "path outside the source"),
        ("a\0b,cat,train", "path outside the source"),
        (f"{'x' * 5000}.jpg,cat,train", "missing image"),
        ("link.jpg,cat,train", ""),
    ]
    text = "\n".join(["path,label,split", *(row for row, _ in rows)])
    (folder / "labels.csv").write_text(text)
    source = csv.read(str(folder), {})
    found = [item.problem[0] if item.problem else "" for item in source.items]
    assert found == [problem for _, problem in rows]
    assert [item.row for item in source.items] == list(range(2, 2 + len(rows)))
    with pytest.raises(TesseraError, match="lies outside"):
        source.load(source.items[-1])


def test_columns_delimiter_and_folder_may_be_given(tmp_path: Path) -> None:
    folder = made.table(tmp_path / "set")
    (folder / "labels.csv").unlink()
    text = "id;breed;fold\n0.jpg;10;train\n1.jpg;9;test\n"
    (folder / "my.csv").write_text(text)
    assert not csv.recognises(str(folder))
    options = {
        "path_column": "id",
        "label_column": "breed",
        "split_column": "FOLD",
        "delimiter": ";",
        "images": "photos",
    }
    source = csv.read(str(folder), options)
    assert source.classes == ("9", "10")
    assert [(i.label, i.split, i.problem) for i in source.items] == [
        (1, "train", None),
        (0, "test", None),
    ]
    (folder / "my.csv").write_text(text.replace(";", "\t"))
    assert len(csv.read(str(folder), {**options, "delimiter": "tab"}).items) == 2
    del options["delimiter"]  # the header tells
    assert len(csv.read(str(folder), options).items) == 2
    for name, value in (("delimiter", ""), ("delimiter", "::"), ("images", "none")):
        with pytest.raises(UsageError, match=f"option {name}"):
            csv.read(str(folder), {**options, name: value})
    with pytest.raises(UsageError, match=r"no column name.*give --option path_column"):
        csv.read(str(folder), {**options, "delimiter": "tab", "path_column": "name"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "has no column path"),
        (b"path,label\n", "no labelled images"),
        (b"path,label\na.jpg,x,y\n", "row 2: 3 columns"),
        (b"path,label\na.jpg,\n", "no labelled images"),
        (b'path,label\n"a.jpg,x', "can't be read"),
        (b"path,label\n\xff.jpg,x\n", "is no UTF-8"),
        (b"path,label\na.jpg,\x1b[31m\n", "can't be printed"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, text: bytes, says: str) -> None:
    (tmp_path / "labels.csv").write_bytes(text)
    with pytest.raises(TesseraError, match=says):
        csv.read(str(tmp_path), {})


def test_two_tables_are_not_guessed_between(tmp_path: Path) -> None:
    folder = made.table(tmp_path / "set")
    (folder / "more.csv").write_bytes((folder / "labels.csv").read_bytes())
    assert not csv.recognises(str(folder))
    with pytest.raises(TesseraError, match="has 2 tables"):
        csv.read(str(folder), {})


def test_images_alone_are_read(tmp_path: Path) -> None:
    for name in (
        "a.jpg",
        "train/b.png",
        "train/deep/c.jpg",
        "valid/d.jpg",
        "TEST/e.jpg",
        "x/f.jpg",
    ):
        made.image(tmp_path / "set" / name)
    (tmp_path / "set" / "notes.txt").write_text("x")
    source = images.read(str(tmp_path / "set"), {})
    assert (source.task, source.classes, source.annotate) == ("images", (), None)
    assert {item.origin: item.split for item in source.items} == {
        "TEST/e.jpg": "test",
        "a.jpg": None,
        "train/b.png": "train",
        "train/deep/c.jpg": "train",
        "valid/d.jpg": "val",
        "x/f.jpg": None,
    }
    assert source.notes == ("1 files that are not named like images are left out",)
    assert source.load(source.items[0]) == source.files(source.items[0])[0].read_bytes()
    with pytest.raises(TesseraError, match="no folder"):
        images.read(str(tmp_path / "none"), {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(TesseraError, match="has no images"):
        images.read(str(tmp_path / "empty"), {})


@pytest.mark.parametrize(
    ("paths", "fits"),
    [
        (["a.jpg", "b.png"], True),
        (["train/a.jpg", "val/b.jpg", "test/c.jpg"], True),
        (["images/a.jpg"], True),
        (["cat/a.jpg", "dog/b.jpg"], False),
        (["train/cat/a.jpg", "train/dog/b.jpg"], False),
        (["images/a.jpg", "masks/b.jpg"], False),
        (["images/a.jpg", "labels/b.json"], False),
        (["a.txt"], False),
    ],
)
def test_images_are_what_remains(tmp_path: Path, paths: list[str], fits: bool) -> None:
    for path in paths:
        if path.endswith(("jpg", "png")):
            made.image(tmp_path / path)
        else:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("{}")
    assert bool(images.recognises(str(tmp_path))) == fits


def test_medmnist_is_read(tmp_path: Path) -> None:
    folder = made.medmnist(tmp_path / "set")
    for place in (folder, folder / "pathmnist.npz"):
        assert medmnist.recognises(str(place)) == "train images and labels in pathmnist.npz"
        source = medmnist.read(str(place), {})
        assert (source.name, source.classes) == ("pathmnist", ("0", "1", "2", "3"))
        assert Counter(item.split for item in source.items) == {"train": 12, "val": 4, "test": 5}
    true = np.load(folder / "pathmnist.npz")
    for item in source.items:
        pixels = decode_image(source.load(item), 3).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, true[f"{item.split}_images"][item.row])
        assert item.label == true[f"{item.split}_labels"][item.row, 0]


def test_grey_and_fortran_arrays_are_read(tmp_path: Path) -> None:
    grey = np.asfortranarray(np.random.default_rng(0).integers(0, 256, (4, 28, 20), np.uint8))
    folder = made.medmnist(tmp_path / "set", val_images=grey)
    source = medmnist.read(str(folder), {})
    for item in [item for item in source.items if item.split == "val"]:
        pixels = decode_image(source.load(item), 1)[0].numpy()
        np.testing.assert_array_equal(pixels, grey[item.row])


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"train_labels": np.zeros((12, 14), np.uint8)}, "14 labels an image: only one"),
        ({"train_images": np.zeros((12, 28, 28, 28), np.uint8)}, "volumes are not read"),
        ({"train_images": np.zeros((12, 28, 28), np.float32)}, "is float32 of shape"),
        ({"train_labels": np.zeros((12, 1), np.float32)}, "no labels"),
        ({"train_labels": np.zeros(11, np.uint8)}, "12 train_images and 11 train_labels"),
        ({"train_labels": np.full(12, -1, np.int64)}, "labels from -1 to -1"),
        ({"train_labels": np.full(12, 10**12)}, "labels from 1000000000000"),
        ({"train_labels": np.array([None] * 12)}, "array of object"),
        ({"train_images": np.zeros((12, 0, 28), np.uint8)}, "no images"),
    ],
)
def test_sets_of_another_kind_are_refused_by_name(
    tmp_path: Path, arrays: dict[str, np.ndarray], says: str
) -> None:
    folder = made.medmnist(tmp_path / "set", "chestmnist", **arrays)
    with pytest.raises(TesseraError, match=says):
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
def test_claims_and_bombs_are_refused_before_they_are_read(tmp_path: Path) -> None:
    labels = npy(np.zeros(2, np.uint8))
    small = np.zeros((2, 8, 8), np.uint8)
    claims = {
        "says it holds": npy(small, shape=(50_000, 1000, 1000)),
        "another number": npy(small, shape=(2, 8, 9)),
        "refused": npy(small, shape=(2, 100_000, 100_000)),
        "can't be read|refused": npy(small, shape=(-2, 8, 8)),
        "can't be read": b"\x93NUMPY\x01\x00v\x00{'descr': '|u1'}",
    }
    for number, (says, data) in enumerate(claims.items()):
        folder = npz(tmp_path / str(number), {"train_images": data, "train_labels": labels})
        with pytest.raises(TesseraError, match=says):
            medmnist.read(str(folder), {})
    bomb = npy(np.zeros((2, 5000, 5000), np.uint8))
    folder = npz(tmp_path / "bomb", {"train_images": bomb, "train_labels": labels})
    assert (folder / "x.npz").stat().st_size < 100_000
    with pytest.raises(TesseraError, match="unfolds to over 100 times"):
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
    folder = made.medmnist(tmp_path / "set", train_labels=array)
    with pytest.raises(TesseraError, match="array of object"):
        medmnist.read(str(folder), {})
    assert not (tmp_path / "marker").exists()
    with np.load(folder / "pathmnist.npz", allow_pickle=True) as loaded:  # the control
        for opened in loaded["train_labels"]:
            opened.close()
    assert (tmp_path / "marker").exists()
