"""Parquet files with the bytes of images, as Hugging Face's data sets are downloaded.

In: SOURCE/…/train-00000-of-00002.parquet, with a column of images (`{bytes, path}`, or bytes) and
a column of labels or objects. Out: a `Source` for classification or detection. The name of a file,
or of its folder, gives the split; names of classes are those in the file's metadata. Only columns
of plain values are read.

A row group is decompressed as a whole; the last ones are kept, up to `CACHE_BYTES` in a process.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers.support import huggingface_rows
from pipelines.data.importers.support.huggingface_rows import RowLabels, read_labels
from pipelines.data.importers.support.reading import need_folder, split_of
from pipelines.data.sources import AmbiguousError, Item, Reading, Source, find_files

NAME = "parquet"
OPTIONS: Mapping[str, str] = {
    **huggingface_rows.OPTIONS,
    "image_column": "column with the images, if several have some",
}
CACHE_BYTES = 512 << 20
MAX_GROUP_BYTES = 2 << 30
_PART = re.compile(r"(.+?)-\d+(-of-\d+)?(-[0-9a-f]{16})?")


class _Place(NamedTuple):
    """Where a row is: file, row group, and row in the group."""

    path: str
    group: int
    row: int


def recognises(source: str) -> str:
    """Raises AmbiguousError for images in several columns."""
    folder = Path(source)
    if not folder.is_dir():
        return ""
    first = next(_find(folder), None)
    try:
        column = _image_column(folder / first, {}) if first else ""
    except AmbiguousError:
        raise
    except TesseraError:
        return ""
    return f"images in the column {column} of {first}" if column else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads all columns but the images. Raises TesseraError for a damaged file, for files without
    images, and for a row group of more than 2 GiB."""
    folder = need_folder(source)
    paths = list(_find(folder))
    if not paths:
        raise TesseraError(f"{source} has no Parquet files")
    column = _image_column(folder / paths[0], options)
    rows: list[dict[str, Any]] = []
    places: list[_Place] = []
    splits: list[Split | None] = []
    for path in paths:
        file = _open(folder / path)
        of_images = {column, *_image_columns(folder / path)}
        others = [name for name in file.schema_arrow.names if name not in of_images]
        with _reading(folder / path):
            count = file.metadata.num_rows
            rows += file.read(columns=others).to_pylist() if others else [{}] * count
        places += _places(file, path)
        splits += [_split(path)] * count
    names = _class_names(folder / paths[0])
    labels = read_labels(Path(paths[0]), rows, column, options, names, NAME)
    return Source(
        name=folder.resolve().name,
        task=labels.task,
        classes=labels.classes,
        items=_items(places, splits, labels),
        load=partial(_load, folder, column, tuple(places)),
        annotate=partial(_annotate, folder, column, tuple(places), labels)
        if labels.objects
        else None,
        files=partial(_files, folder, tuple(places)),
        folder=folder,
        shared_files=tuple(folder / path for path in paths),
    )


def _items(
    places: Sequence[_Place], splits: Sequence[Split | None], labels: RowLabels
) -> list[Item]:
    items = []
    counted: dict[str, int] = {}
    for at, (place, given, label) in enumerate(zip(places, splits, labels.labels)):
        row = counted[place.path] = counted.get(place.path, -1) + 1
        origin = f"{place.path}[{row}]"
        split, problem = labels.split(at, given)
        if label is None and labels.task == "classification":
            problem = ("missing label", f"{origin} has no {labels.column}")
        key = make_key(f"{place.path.removesuffix('.parquet')}/{row:06d}")
        items.append(Item(key, origin, label, split, at, problem))
    return items


def _find(folder: Path) -> Iterator[str]:
    return (path for path in find_files(folder) if path.lower().endswith(".parquet"))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged file into a TesseraError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TesseraError(
            f"{path.name} can't be read: {reason}", hint="download it again"
        ) from None


def _open(path: Path) -> Any:
    from pyarrow import parquet

    if not path.is_file():  # opening a pipe would block
        raise TesseraError(f"{path} is not a regular file")
    with _reading(path):
        return parquet.ParquetFile(path)


def _image_columns(path: Path) -> list[str]:
    """The columns with the bytes of images."""
    import pyarrow

    def has_bytes(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            inner = [kind.field(at) for at in range(kind.num_fields)]
            return any(field.name == "bytes" and has_bytes(field.type) for field in inner)
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    return [field.name for field in _open(path).schema_arrow if has_bytes(field.type)]


def _image_column(path: Path, options: Mapping[str, str]) -> str:
    """The column of images. Raises TesseraError if there is none, AmbiguousError for several."""
    fitting = _image_columns(path)
    if len(fitting) > 1 and "image_column" not in options:
        raise AmbiguousError(
            f"{path.name} has images in several columns: {', '.join(fitting)[:200]}",
            hint="choose one: --option image_column=NAME",
            readings=[
                Reading(NAME, {**options, "image_column": name}, f"the images in {name}")
                for name in fitting[:6]
            ],
        )
    wanted = options.get("image_column", fitting[0] if fitting else "")
    if wanted not in fitting:
        columns = _open(path).schema_arrow.names
        raise TesseraError(
            f"{path.name} has no column with the bytes of images"
            + (f" named {wanted}" if wanted else ""),
            hint=f"its columns are {', '.join(columns)[:200]}",
        )
    return wanted


def _class_names(path: Path) -> dict[str, list[str]]:
    """Column -> names of its classes, from Hugging Face's note in the file."""
    raw = (_open(path).schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(raw)["info"]["features"]
        return {name: names for name, feature in features.items() if (names := _names(feature))}
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _names(feature: Any) -> list[str]:
    """The first list of class names in a feature, which may be nested."""
    if isinstance(feature, list):
        feature = dict(enumerate(feature))
    if not isinstance(feature, dict):
        return []
    names = feature.get("names")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return list(names)
    return next((found for value in feature.values() if (found := _names(value))), [])


def _places(file: Any, path: str) -> Iterator[_Place]:
    for group in range(file.metadata.num_row_groups):
        found = file.metadata.row_group(group)
        if found.total_byte_size > MAX_GROUP_BYTES:
            raise TesseraError(
                f"{path}: its row group {group} has {found.total_byte_size:,} bytes",
                hint="write it again with smaller row groups: they are read as a whole",
            )
        yield from (_Place(path, group, row) for row in range(found.num_rows))


def _split(path: str) -> Split | None:
    folder, _, name = path.removesuffix(".parquet").rpartition("/")
    match = _PART.fullmatch(name)
    words = [match[1] if match else name, *reversed(folder.split("/"))]
    return next((split for word in words if (split := split_of(word))), None)


class _Groups:
    """The images of the row groups that were read last."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, int, str], Any] = OrderedDict()

    def get(self, path: Path, group: int, column: str) -> Any:
        key = (str(path), group, column)
        if key not in self._groups:
            file = _open(path)
            with _reading(path):
                self._groups[key] = file.read_row_group(group, columns=[column]).column(0)
        self._groups.move_to_end(key)
        while len(self._groups) > 1 and sum(c.nbytes for c in self._groups.values()) > CACHE_BYTES:
            self._groups.popitem(last=False)
        return self._groups[key]


_GROUPS = _Groups()


def _load(folder: Path, column: str, places: Sequence[_Place], item: Item) -> bytes:
    place = places[item.row]
    images = _GROUPS.get(folder / place.path, place.group, column)
    with _reading(folder / place.path):
        value = images[place.row].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise TesseraError(f"{item.origin} has no bytes of an image, only a path")
    return data


def _annotate(
    folder: Path, column: str, places: Sequence[_Place], labels: RowLabels, item: Item
) -> Objects:
    data = _load(folder, column, places, item)
    return huggingface_rows.read_objects(data, item.origin, *labels.objects[item.row])


def _files(folder: Path, places: Sequence[_Place], item: Item) -> tuple[Path, ...]:
    return (folder / places[item.row].path,)
