"""Any data set of torchvision that is on disk: `--format torchvision:NAME`.

In: the folder that torchvision calls `root`, and the name of a class of `torchvision.datasets`.
Out: a `Source` for classification if the targets are numbers, for semantic segmentation if they are
images. Image files are packed unchanged; images that the data set only has in memory become PNG.

torchvision's code runs here, and some of it unpickles. While it runs, a guard allows pickles to
build arrays only, and no connection and no process to be started: `download=False` is passed and
enforced.
"""

from __future__ import annotations

import inspect
import operator
import os
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.core.errors import TesseraError, unknown
from pipelines.data.annotations import IGNORED, Mask
from pipelines.data.card import Split
from pipelines.data.images import encode_png
from pipelines.data.importers.support.reading import SPLIT_ORDER, read_inside
from pipelines.data.importers.support.unpickle_guard import guarded
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Item, Source

NAME = "torchvision"
OPTIONS: Mapping[str, str] = {
    "name": "a class of torchvision.datasets; --format torchvision:NAME is short for it"
}
_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "trainval"),
    "val": ("val", "valid"),
    "test": ("test",),
}
_LISTS = ("samples", "imgs", "_samples", "_image_files", "_images", "images")
"""Attributes in which data sets without a `loader` have their paths."""
Arguments = tuple[tuple[str, Any], ...]


def recognises(source: str) -> str:
    return ""  # the files don't tell which class it is


def read(source: str, options: Mapping[str, str]) -> Source:
    """Opens the data set for each split that exists.

    Raises UsageError for an unknown name, TesseraError for missing files and for targets that are
    neither numbers nor images.
    """
    name, root = options.get("name", ""), str(Path(source).resolve())
    kind = _kind(name)
    arguments = _arguments(name, kind, root)
    items: list[Item] = []
    masks, most = False, 0
    for split, given in arguments.items():
        made = _make(name, root, given)
        for row in range(len(made)):
            sample, target = _get(name, made, row)
            number, is_mask = _number(name, target)
            masks, most = masks or is_mask, max(most, number)
            path = _path_of(made, sample, row)
            origin = os.path.relpath(path, root) if path else f"{name} {split or ''}[{row}]"
            label = None if is_mask else number
            items.append(Item(f"{split or 'all'}/{row:06d}", origin, label, split, row))
    if not items:
        raise TesseraError(f"torchvision's {name} in {source} is empty")
    classes = _classes(_make(name, root, next(iter(arguments.values()))), most)
    return Source(
        name=name,
        task="semantic_segmentation" if masks else "classification",
        classes=classes,
        items=items,
        load=partial(_load, name, root, arguments),
        annotate=partial(_annotate, name, root, arguments) if masks else None,
    )


def _kind(name: str) -> type[Any]:
    from torchvision import datasets

    kinds = {
        each: kind
        for each in datasets.__all__
        if inspect.isclass(kind := getattr(datasets, each))
        and issubclass(kind, datasets.VisionDataset)
    }
    if name not in kinds:
        raise unknown("data set of torchvision", name, kinds)
    return kinds[name]


def _arguments(name: str, kind: type[Any], root: str) -> dict[Split | None, Arguments]:
    """The arguments of the data set's class for each split that exists."""
    known = inspect.signature(kind).parameters
    fixed: dict[str, Any] = {}
    if "root" in known:
        fixed["root"] = root
    if "download" in known:
        fixed["download"] = False
    if "loader" in known:
        fixed["loader"] = _path
    if "train" in known:
        return {
            "train": tuple({**fixed, "train": True}.items()),
            "test": tuple({**fixed, "train": False}.items()),
        }
    word = next((word for word in ("split", "image_set") if word in known), None)
    if word is None:
        return {None: tuple(fixed.items())}
    found: dict[Split | None, Arguments] = {}
    problem = TesseraError("")
    for split in SPLIT_ORDER:
        for value in _WORDS[split]:
            given = tuple({**fixed, word: value}.items())
            try:
                _make(name, root, given)
            except TesseraError as error:
                problem = problem if problem.message else error
                continue
            found[split] = given
            break
    if "train" not in found:
        raise problem
    return found


def _path(path: Any) -> Any:
    """Replaces a data set's loader: returns the file's path instead of its pixels."""
    return os.fspath(path)


@lru_cache(8)
def _make(name: str, root: str, arguments: Arguments) -> Any:
    what = f"torchvision's {name} in {root}"
    with guarded(what):
        try:
            return _kind(name)(**dict(arguments))
        except (TesseraError, MemoryError):
            raise
        except Exception as error:  # data sets raise all kinds of errors for missing files
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise TesseraError(f"{what} can't be opened: {reason}") from None


def _get(name: str, made: Any, row: int) -> tuple[Any, Any]:
    """(image or its path, target) of a sample."""
    what = f"torchvision's {name}, sample {row},"
    with guarded(what):
        try:
            sample, target = made[row]
        except (TesseraError, MemoryError):
            raise
        except Exception as error:  # as above
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise TesseraError(f"{what} can't be read: {reason}") from None
    return sample, target


def _number(name: str, target: Any) -> tuple[int, bool]:
    """(class, False) for a class number, (largest class, True) for a mask."""
    if isinstance(target, Image.Image):
        pixels = np.asarray(target)
        return int(pixels[pixels != IGNORED].max(initial=0)), True
    try:
        number = operator.index(target)  # also NumPy's and torch's
    except TypeError:
        number = -1
    if number < 0:
        raise TesseraError(
            f"torchvision's {name} has the target {str(target)[:50]!r}, which is neither a class "
            "nor a mask",
            hint="for boxes use the formats coco, voc and yolo",
        )
    return number, False


def _path_of(made: Any, sample: Any, row: int) -> str:
    """The sample's file, if the data set names one."""
    if isinstance(sample, str):
        return sample
    for attribute in _LISTS:
        rows = getattr(made, attribute, None)
        if isinstance(rows, list) and len(rows) == len(made):
            found = rows[row][0] if isinstance(rows[row], tuple) else rows[row]
            if isinstance(found, str | os.PathLike):
                return os.fspath(found)
    return ""


def _classes(made: Any, most: int) -> tuple[str, ...]:
    names = getattr(made, "classes", None)
    if isinstance(names, list | tuple) and len(names) > most:
        # ImageNet's classes have several names each.
        joined = tuple(", ".join(n) if isinstance(n, tuple) else str(n) for n in names)
        if len(set(joined)) == len(joined):
            return joined
    return tuple(str(number) for number in range(most + 1))


def _load(name: str, root: str, arguments: Mapping[Split | None, Arguments], item: Item) -> bytes:
    made = _make(name, root, arguments[item.split])
    sample, _ = _get(name, made, item.row)
    path = _path_of(made, sample, item.row)
    if path:
        return read_inside(Path(root), os.path.relpath(path, root))
    if not isinstance(sample, Image.Image):
        raise TesseraError(f"{item.origin} is a {type(sample).__name__}, not an image")
    return encode_png(np.asarray(sample if sample.mode in ("L", "RGB") else sample.convert("RGB")))


def _annotate(
    name: str, root: str, arguments: Mapping[Split | None, Arguments], item: Item
) -> Mask:
    _, target = _get(name, _make(name, root, arguments[item.split]), item.row)
    if not isinstance(target, Image.Image) or target.mode not in ("L", "P"):
        raise SampleError("unreadable mask", f"{item.origin} has a mask that is not 8-bit")
    return Mask(np.array(target))
