"""CIFAR-10 and CIFAR-100 in their original files, in the "python" or the "binary" version.

In: cifar-10-batches-py, cifar-10-batches-bin, cifar-100-python or cifar-100-binary, or the folder
that contains one. Out: a `Source` with train and test. The python version is read without
unpickling (`safe_pickle`). CIFAR-10 as a folder of images is read by `image_folder`. A. Krizhevsky,
"Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.core.errors import TesseraError
from pipelines.data.card import Split
from pipelines.data.images import encode_png
from pipelines.data.importers.support import safe_pickle
from pipelines.data.importers.support.reading import choose, nearby
from pipelines.data.sources import Item, Source, read_file

NAME = "cifar10"
OPTIONS: Mapping[str, str] = {
    "labels": "for CIFAR-100: fine (100 classes, the default) or coarse (20)"
}
_PIXELS = 3 * 32 * 32
_Array = np.ndarray[Any, Any]


class _Form(NamedTuple):
    """A version: its files by split, the files with class names, and labels in each binary row."""

    train: tuple[str, ...]
    test: str
    names: Mapping[str, str]
    labels: int

    @property
    def binary(self) -> bool:
        return self.test.endswith(".bin")


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_FORMS = (
    _Form(_BATCHES, "test_batch", {"fine": "batches.meta"}, 0),
    _Form(
        tuple(f"{name}.bin" for name in _BATCHES),
        "test_batch.bin",
        {"fine": "batches.meta.txt"},
        1,
    ),
    _Form(("train",), "test", {"fine": "meta", "coarse": "meta"}, 0),
    _Form(
        ("train.bin",),
        "test.bin",
        {"fine": "fine_label_names.txt", "coarse": "coarse_label_names.txt"},
        2,
    ),
)


def recognises(source: str) -> str:
    found = _find(source)
    return f"CIFAR batches in {found[0][0].name}" if len(found) == 1 else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads all pixels into memory. Raises TesseraError that names a missing or damaged file."""
    found = _find(source)
    if len(found) != 1:
        raise TesseraError(
            f"{source} holds {len(found) or 'no'} versions of CIFAR",
            hint="give cifar-10-batches-py, cifar-10-batches-bin, cifar-100-python or "
            "cifar-100-binary",
        )
    folder, form = found[0]
    kind = choose(options, "labels", form.names, "fine")
    classes = _names(folder, form, kind)
    pixels: dict[str, _Array] = {}
    items: list[Item] = []
    count = {"train": 0, "test": 0}
    for split, name in _files_of(form):
        path = folder / name
        if not path.is_file():
            raise TesseraError(f"{folder} has no {name}", hint="unpack the archive again")
        data = read_file(path, name, safe_pickle.MAX_BYTES)
        pixels[name], labels = _batch(data, form, kind, name)
        if labels and not 0 <= min(labels) <= max(labels) < len(classes):
            raise TesseraError(
                f"{name} has labels from {min(labels)} to {max(labels)}, there are {len(classes)} "
                "classes"
            )
        for row, label in enumerate(labels):
            key = f"{split}/{count[split] + row:05d}"
            items.append(Item(key, f"{name}[{row}]", label, split, row))
        count[split] += len(labels)
    if not items:
        raise TesseraError(f"{source} has no images: its batches are empty")
    files = partial(_files, tuple(folder / name for _, name in _files_of(form)))
    return Source(
        name=Path(source).resolve().name,
        task="classification",
        classes=classes,
        items=items,
        load=partial(_load, pixels),
        files=files,
        folder=Path(source),
        shared_files=tuple(folder / name for name in form.names.values()),
    )


def _find(source: str) -> list[tuple[Path, _Form]]:
    """(folder, form) of each version whose first batch and class names exist."""
    found = []
    for folder in nearby(source, 1):
        for form in _FORMS:
            needed = {form.train[0], *form.names.values()}
            if all((folder / name).is_file() for name in needed):
                found.append((folder, form))
    return found


def _files_of(form: _Form) -> Iterator[tuple[Split, str]]:
    for name in form.train:
        yield "train", name
    yield "test", form.test


def _names(folder: Path, form: _Form, kind: str) -> tuple[str, ...]:
    where = form.names[kind]
    data = read_file(folder / where, where)
    if form.binary:
        names = [line.strip() for line in data.decode("utf-8", "replace").split("\n")]
        names = [name for name in names if name]
    else:
        content = _fields(data, where)
        listed = content.get("label_names", content.get(f"{kind}_label_names"))
        names = [_text(name) for name in listed] if isinstance(listed, list) else []
    if not names or not all(name.isprintable() for name in names) or len(set(names)) != len(names):
        raise TesseraError(f"{where} has no list of class names")
    return tuple(names)


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _fields(data: bytes, where: str) -> dict[str, Any]:
    content = safe_pickle.read(data, where)
    if not isinstance(content, dict):
        raise TesseraError(f"{where} has no dictionary")
    return {_text(key): value for key, value in content.items()}


def _batch(data: bytes, form: _Form, kind: str, where: str) -> tuple[_Array, list[int]]:
    """Pixels uint8 (N, 3072), channels first, and N labels."""
    if form.binary:
        size = form.labels + _PIXELS
        if len(data) % size:
            raise TesseraError(
                f"{where} has {len(data)} bytes, which is not a multiple of {size}",
                hint="download it again",
            )
        rows = np.frombuffer(data, np.uint8).reshape(-1, size)
        column = form.labels - 1 if kind == "fine" else 0
        return rows[:, form.labels :], [int(label) for label in rows[:, column]]
    content = _fields(data, where)
    pixels = content.get("data")
    labels = content.get("labels", content.get(f"{kind}_labels"))
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise TesseraError(f"{where} has no `data` with {_PIXELS} bytes a row")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise TesseraError(f"{where} has no list of labels")
    if len(labels) != len(pixels):
        raise TesseraError(f"{where} has {len(pixels)} images and {len(labels)} labels")
    return pixels, labels


def _load(pixels: Mapping[str, _Array], item: Item) -> bytes:
    row = pixels[item.origin.rpartition("[")[0]][item.row]
    return encode_png(np.ascontiguousarray(row.reshape(3, 32, 32).transpose(1, 2, 0)))


def _files(paths: tuple[Path, ...], item: Item) -> tuple[Path, ...]:
    return paths
