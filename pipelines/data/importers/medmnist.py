"""MedMNIST: images and labels of three splits in an .npz file.

In: the file, or a folder with one. Out: a `Source` for classification. Classes are numbers, since
the file has no names. Sets with several labels an image, or of volumes, are refused. J. Yang et
al., "MedMNIST v2", Scientific Data 10, 2023.

The arrays are read according to their headers and never unpickled. An array that claims more than
16 GiB, or decompresses to over 100 times its size, is refused before it is read; the option
`max_bytes` sets another limit.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from models.core.errors import TesseraError
from pipelines.data import image_reading
from pipelines.data.card import Split
from pipelines.data.images import encode_png
from pipelines.data.importers.support.reading import (
    MAX_BYTES_OPTION,
    SPLIT_ORDER,
    read_max_bytes,
)
from pipelines.data.sources import Item, Source

NAME = "medmnist"
OPTIONS: Mapping[str, str] = MAX_BYTES_OPTION
MAX_BYTES = 16 << 30
MAX_RATIO = 100
_SMALL_BYTES = 16 << 20
_Array = np.ndarray[Any, Any]


def recognises(source: str) -> str:
    path = _find(source)
    return f"train images and labels in {path.name}" if path else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads all pixels into memory. Raises TesseraError that names a damaged array."""
    path = _find(source)
    if path is None:
        raise TesseraError(
            f"{source} has no .npz file with train_images and train_labels",
            hint="give the file, or a folder with one",
        )
    limit = read_max_bytes(options)
    pixels: dict[str, _Array] = {}
    items: list[Item] = []
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            for split in SPLIT_ORDER:
                if f"{split}_images.npy" in names:
                    pixels[split], labels = _read_split(archive, split, limit)
                    items += [
                        Item(f"{split}/{row:06d}", f"{split}_images[{row}]", label, split, row)
                        for row, label in enumerate(labels)
                    ]
    # What zipfile and NumPy's header parser raise on damaged bytes.
    except (
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        EOFError,
        OSError,
        RuntimeError,
        NotImplementedError,
        KeyError,
        SyntaxError,
        TypeError,
        MemoryError,
    ) as error:
        raise TesseraError(
            f"{path.name} can't be read: {error}", hint="download it again"
        ) from None
    if not items:
        raise TesseraError(f"{path.name} has no images")
    classes = tuple(str(n) for n in range(max(item.label or 0 for item in items) + 1))
    load = partial(_load, pixels)
    files = partial(_files, path)
    folder = Path(source) if Path(source).is_dir() else None
    return Source(path.stem, "classification", classes, items, load, files=files, folder=folder)


def _find(source: str) -> Path | None:
    given = Path(source)
    paths = sorted(given.glob("*.npz")) if given.is_dir() else [given]
    found = [path for path in paths if path.suffix == ".npz" and path.is_file() and _fits(path)]
    return found[0] if len(found) == 1 else None


def _fits(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return {"train_images.npy", "train_labels.npy"} <= set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _read_split(
    archive: zipfile.ZipFile, split: Split, limit: int | None
) -> tuple[_Array, list[int]]:
    images = _read_array(archive, f"{split}_images", limit)
    labels = _read_array(archive, f"{split}_labels", limit)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise TesseraError(f"{split}_images is {images.dtype} of shape {images.shape}, not images")
    if images.ndim == 4 and images.shape[3] != 3:
        raise TesseraError(
            f"{split}_images has the shape {images.shape}: volumes are not supported",
            hint="sets whose names end in 3D have volumes; use another one",
        )
    if labels.dtype.kind not in "iu" or labels.ndim not in (1, 2):
        raise TesseraError(f"{split}_labels is {labels.dtype} of shape {labels.shape}, not labels")
    if labels.ndim == 2 and labels.shape[1] != 1:
        raise TesseraError(
            f"{split}_labels has {labels.shape[1]} labels an image: only one is supported",
            hint="ChestMNIST is such a set; use one with a single label",
        )
    if len(labels) != len(images):
        raise TesseraError(f"{len(images)} {split}_images and {len(labels)} {split}_labels")
    flat = [int(label) for label in labels.ravel()]
    if flat and not 0 <= min(flat) <= max(flat) < 10_000:
        raise TesseraError(f"{split}_labels has labels from {min(flat)} to {max(flat)}")
    return images, flat


def _read_array(archive: zipfile.ZipFile, name: str, limit: int | None) -> _Array:
    info = archive.getinfo(f"{name}.npy")
    most = limit or MAX_BYTES
    if info.file_size > most:
        raise TesseraError(
            f"{name} claims {info.file_size} bytes: too many, the limit is {most:,}",
            hint=f"if it is so large: --option max_bytes={info.file_size}",
        )
    if not limit and info.file_size > max(_SMALL_BYTES, MAX_RATIO * info.compress_size):
        raise TesseraError(
            f"{name} decompresses to over {MAX_RATIO} times its size: refused",
            hint=f"if it is so large: --option max_bytes={info.file_size}",
        )
    with archive.open(info) as file:
        shape, fortran, dtype = _read_header(file)
        size = math.prod(shape) * dtype.itemsize
        if (
            dtype.hasobject
            or min(shape, default=1) < 0
            or math.prod(shape[1:]) > image_reading.current().max_pixels
        ):
            raise TesseraError(f"{name} is an array of {dtype} of shape {shape}: refused")
        if size != info.file_size - file.tell():
            raise TesseraError(f"{name} claims {size} bytes and has another number")
        data = file.read(size)
    if len(data) != size:
        raise TesseraError(f"{name} is truncated", hint="download it again")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _load(pixels: Mapping[str, _Array], item: Item) -> bytes:
    return encode_png(np.ascontiguousarray(pixels[item.split or ""][item.row]))


def _files(path: Path, item: Item) -> tuple[Path, ...]:
    return (path,)
