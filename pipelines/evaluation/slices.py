"""Parts of a data set in which a network may be worse than on the whole.

In: traits and keys of the images. Out: named lists of indices. Must not know the network.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.core.errors import UsageError
from models.core.family import Batch

MOST_VALUES = 12
"""A field of text with more values makes no slices: they probably are names of images."""
THIRDS = ("lowest third", "middle third", "highest third")


@dataclass(frozen=True)
class Traits:
    """Sides of an image in pixels as stored, and its mean brightness in 0..1."""

    height: int
    width: int
    brightness: float


@dataclass(frozen=True)
class Slice:
    """The indices of images that have something in common. `span` is the range of the values, if
    they are numbers."""

    by: str
    name: str
    indices: tuple[int, ...]
    span: str = ""


def describe(batch: Batch) -> list[Traits]:
    """The traits of each image in a batch of the loader."""
    images: Tensor = batch["image"]
    sizes = batch["size"].tolist() if "size" in batch else [list(images.shape[-2:])] * len(images)
    extents = batch["extent"].tolist()
    traits = []
    for image, (height, width), (high, wide) in zip(images, sizes, extents, strict=True):
        inside = image[:, :high, :wide].to(torch.float32)
        traits.append(Traits(int(height), int(width), float(inside.mean()) / 255))
    return traits


def make(
    traits: Sequence[Traits], keys: Sequence[str], fields: Mapping[str, Mapping[str, str]]
) -> list[Slice]:
    """Makes slices by size, by brightness, and by each field of `fields`: name -> key -> value."""
    columns: dict[str, Sequence[float | str]] = {}
    if traits:
        columns["size (√ pixels)"] = [(t.height * t.width) ** 0.5 for t in traits]
        columns["brightness"] = [t.brightness for t in traits]
    for name, values in fields.items():
        texts = [values.get(key, "") for key in keys]
        numbers = [_number(text) for text in texts]
        known = [number for number in numbers if number is not None]
        if len(known) == len(texts) and len(set(known)) > MOST_VALUES:
            columns[name] = known
        else:
            columns[name] = texts
    made: list[Slice] = []
    for name, column in columns.items():
        made += _by_value(name, column) if isinstance(column[0], str) else _thirds(name, column)
    return made


def read_fields(path: Path) -> dict[str, dict[str, str]]:
    """Reads fields of samples from a CSV file with a column `key`: name -> key -> value."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} can't be read as CSV: {error}") from None
    if not rows or "key" not in rows[0]:
        raise UsageError(
            f"{path} has no column 'key'",
            hint="the header is key,FIELD,…, followed by one line per sample",
        )
    names = [name for name in rows[0] if name and name != "key"]
    return {name: {row["key"]: row[name] or "" for row in rows} for name in names}


def _thirds(name: str, column: Sequence[float | str]) -> list[Slice]:
    """Three parts of about the same size; none if most values are equal."""
    values = np.asarray(column, dtype=np.float64)
    edges = np.quantile(values, [1 / 3, 2 / 3])
    part = np.searchsorted(edges, values, side="left")
    thirds = []
    for third, label in enumerate(THIRDS):
        indices = np.flatnonzero(part == third)
        if len(indices):
            low, high = values[indices].min(), values[indices].max()
            span = f"{low:.3g} to {high:.3g}"
            thirds.append(Slice(name, label, tuple(indices.tolist()), span))
    return thirds if len(thirds) > 1 else []


def _by_value(name: str, column: Sequence[float | str]) -> list[Slice]:
    values = sorted({str(value) for value in column if value != ""})
    if not 1 < len(values) <= MOST_VALUES:
        return []
    return [
        Slice(name, value, tuple(i for i, own in enumerate(column) if own == value))
        for value in values
    ]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
