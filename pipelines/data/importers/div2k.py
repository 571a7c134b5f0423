"""DIV2K and data sets like it: images in a high and in low resolutions.

In: SOURCE/DIV2K_train_HR/0001.png with SOURCE/DIV2K_train_LR_bicubic/X2/0001x2.png, or other
folders with HR and LR in their names. Out: a `Source` of the task `images` with the high
resolution: a training of `super_resolution` makes the low one itself, so those files are left out.
One without a partner belongs to no sample. E. Agustsson and R. Timofte, "NTIRE 2017 Challenge on
Single Image Super-Resolution", CVPR Workshops 2017.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.reading import (
    SPLIT_NAMES,
    load,
    nearby,
    need_folder,
)
from pipelines.data.sources import Item, Source, find_folders, find_images

NAME = "div2k"
OPTIONS: Mapping[str, str] = {}
_HIGH = re.compile(r"(?:^|.*[^a-z])(hr|high.?res|gt_?mod[0-9]+)(?:[^a-z].*|$)", re.I)
_LOW = re.compile(r"(?:^|.*[^a-z])(lr|low.?res|lrbicx?[0-9]+)(?:[^a-z].*|$)", re.I)
_SCALE = re.compile(r"(_?x[0-9]+[a-z]?|_?lr|_?hr)$", re.I)


def recognises(source: str) -> str:
    high, low = _find(source)
    if not high or not low:
        return ""
    return f"high resolution in {high[0].name}, low resolution in {low[0].name}"


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists the images of high resolution. Raises TesseraError if there are none."""
    folder = need_folder(source)
    high, low = _find(source)
    partners: dict[str, list[Path]] = {}
    for place in low:
        for path in find_images(place):
            partners.setdefault(_stem(path), []).append(place / path)
    items: list[Item] = []
    files: list[tuple[Path, ...]] = []
    for place in high:
        for path in find_images(place):
            origin = (place / path).relative_to(folder).as_posix()
            key = make_key(os.path.splitext(origin)[0])
            items.append(Item(key, origin, None, _split(place.name), len(files)))
            files.append((place / path, *partners.get(_stem(path), ())))
    if not items:
        raise TesseraError(
            f"{source} has no images of high resolution",
            hint="it must be SOURCE/DIV2K_train_HR/0001.png, or a folder whose name ends in HR",
        )
    paired = sum(len(of_item) - 1 for of_item in files)
    notes: tuple[str, ...] = ()
    if paired:
        notes = (
            f"{paired:,} images of low resolution are left out: a training makes its own from the "
            "high resolution",
        )
    return Source(
        name=folder.resolve().name,
        task="images",
        classes=(),
        items=items,
        load=partial(load, folder),
        files=partial(_files, files),
        notes=notes,
        folder=folder,
    )


def _find(source: str) -> tuple[list[Path], list[Path]]:
    """The folders of high and of low resolution that lie in one folder."""
    for root in nearby(source):
        inner = find_folders(root)
        low = [folder for folder in inner if _LOW.fullmatch(folder.name)]
        high = [folder for folder in inner if _HIGH.fullmatch(folder.name) and folder not in low]
        if high and low:
            return high, low
    return [], []


def _stem(path: str) -> str:
    """The name that both resolutions share: 0001 of 0001x2.png."""
    return _SCALE.sub("", os.path.splitext(os.path.basename(path))[0])


def _split(name: str) -> Split | None:
    words = re.split(r"[^a-z]+", name.lower())
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def _files(files: list[tuple[Path, ...]], item: Item) -> tuple[Path, ...]:
    return files[item.row]
