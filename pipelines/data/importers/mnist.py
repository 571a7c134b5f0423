"""The idx files of MNIST, Fashion-MNIST, KMNIST and the like, with or without .gz.

In: a folder with `train-images-idx3-ubyte` and the others, or torchvision's folder with `raw` in
it. Out: a `Source` with train and test. Y. LeCun, L. Bottou, Y. Bengio and P. Haffner,
"Gradient-based learning applied to document recognition", Proc. IEEE 86(11), 1998.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from models.core.errors import TesseraError
from pipelines.data import image_reading
from pipelines.data.card import Split
from pipelines.data.images import encode_png
from pipelines.data.importers.support.reading import MAX_BYTES_OPTION, read_max_bytes
from pipelines.data.sources import Item, Source

NAME = "mnist"
OPTIONS: Mapping[str, str] = MAX_BYTES_OPTION
_FILE = re.compile(r"(train|t10k|test)[-.](images|labels)[-.]idx[13][-.]ubyte(\.gz)?", re.I)
_MAX_BYTES = 4 << 30
MAX_RATIO = 100
"""A .gz is refused that claims to be more times its size, if the option `max_bytes` isn't given."""
_SMALL_BYTES = 16 << 20
_UBYTE = 8


def recognises(source: str) -> str:
    found = _find(Path(source))
    return f"{len(found)} idx files" if ("train", "images") in found else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads all pixels into memory. Raises TesseraError that names a missing or damaged file."""
    found = _find(Path(source))
    pixels: dict[str, np.ndarray[Any, Any]] = {}
    items: list[Item] = []
    limit = read_max_bytes(options)
    for split in _splits(found):
        for kind in ("images", "labels"):
            if (split, kind) not in found:
                raise TesseraError(
                    f"{source} has no {split} {kind}", hint=f"add {split}-{kind}-idx…-ubyte[.gz]"
                )
        path = found[split, "images"]
        pixels[path.name] = _read_idx(path, 3, limit)
        labels = _read_idx(found[split, "labels"], 1, limit)
        if len(labels) != len(pixels[path.name]):
            raise TesseraError(
                f"{source}: {len(pixels[path.name])} {split} images and {len(labels)} labels"
            )
        items += [
            Item(f"{split}/{row:05d}", f"{path.name}[{row}]", label, split, row)
            for row, label in enumerate(labels.tolist())
        ]
    if not items:
        raise TesseraError(f"{source} has no images: its idx files are empty")
    most = max(item.label or 0 for item in items)
    classes = tuple(str(label) for label in range(most + 1))
    name = Path(source).resolve().name
    return Source(
        name=name,
        task="classification",
        classes=classes,
        items=items,
        load=partial(_encode, pixels),
        files=partial(_files, tuple(found.values())),
        folder=Path(source),
        shared_files=tuple(found.values()),
    )


def _encode(pixels: Mapping[str, np.ndarray[Any, Any]], item: Item) -> bytes:
    return encode_png(pixels[item.origin.rpartition("[")[0]][item.row])


def _files(paths: tuple[Path, ...], item: Item) -> tuple[Path, ...]:
    return paths


def _splits(found: Mapping[tuple[Split, str], Path]) -> list[Split]:
    return sorted({split for split, _ in found} | {"train"}, reverse=True)


def _find(folder: Path) -> dict[tuple[Split, str], Path]:
    """Paths by (split, "images" or "labels"); a decompressed file comes before its .gz."""
    found: dict[tuple[Split, str], Path] = {}
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        if not place.is_dir():
            continue
        for path in sorted(place.iterdir()):
            match = _FILE.fullmatch(path.name)
            if match and path.is_file():
                split: Split = "train" if match[1].lower() == "train" else "test"
                found.setdefault((split, match[2].lower()), path)
        if found:
            break
    return found


def _read_idx(path: Path, dimensions: int, limit: int | None) -> np.ndarray[Any, Any]:
    """uint8 array of the file's shape: (N, H, W) for images, (N,) for labels."""
    try:
        packed = path.suffix.lower() == ".gz"
        with cast(IO[bytes], gzip.open(path) if packed else path.open("rb")) as file:
            if limit is None:
                compressed = max(_SMALL_BYTES, MAX_RATIO * path.stat().st_size)
                limit = min(_MAX_BYTES, compressed if packed else _MAX_BYTES)
            return _parse_idx(file, path.name, dimensions, limit)
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TesseraError(
            f"{path.name} can't be read: {reason}", hint="download it again"
        ) from None


def _parse_idx(file: IO[bytes], name: str, dimensions: int, limit: int) -> np.ndarray[Any, Any]:
    head = file.read(4 + 4 * dimensions)
    if len(head) != 4 + 4 * dimensions or head[:4] != bytes([0, 0, _UBYTE, dimensions]):
        raise TesseraError(f"{name} is not an idx file of bytes with {dimensions} dimensions")
    shape = tuple(np.frombuffer(head, ">u4", offset=4).tolist())
    size = math.prod(shape)
    if size > limit or math.prod(shape[1:]) > image_reading.current().max_pixels:
        raise TesseraError(
            f"{name} claims {' by '.join(map(str, shape))} bytes: too many, the limit is {limit:,}",
            hint=f"if it is so large: --option max_bytes={size}",
        )
    data = file.read(size + 1)  # never more, however large a .gz would become
    if len(data) != size:
        more = "more" if len(data) > size else len(data)
        raise TesseraError(f"{name} claims {size} bytes and has {more}", hint="download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)
