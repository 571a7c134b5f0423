"""An image with a mask file for each of its objects, as the Data Science Bowl 2018 has nuclei.

In: SOURCE/ID/images/x.png with SOURCE/ID/masks/*.png, or SOURCE/stage1_train/ID/…; the object's
pixels are those that are not 0. Out: a `Source` for instance segmentation with one class. Boxes are
those of the masks. J. C. Caicedo et al., "Nucleus segmentation across imaging
experiments: the 2018 Data Science Bowl", Nature Methods 16, 2019.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from models.core.errors import TesseraError
from pipelines.data import rle
from pipelines.data.annotations import Objects, check_mask_size
from pipelines.data.card import Split
from pipelines.data.images import make_key, open_image
from pipelines.data.importers import coco
from pipelines.data.importers.support.reading import (
    image_size,
    list_stems,
    load,
    need_folder,
    read_inside,
    split_of,
)
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Item, Source, find_folders, find_images

NAME = "instance_masks"
OPTIONS: Mapping[str, str] = {"class": "name of the only class; default object"}
_STAGE = re.compile(r"(stage[0-9]_)?(\w+)")


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir() or coco.recognises(source):  # made from these files, and more precise
        return ""
    for place, _ in _places(folder):
        # There may be many: the first ones suffice.
        first = filter(_is_sample, find_folders(place)[:5])
        if any(len(list_stems(inner / "images")) == 1 for inner in first):
            return f"{place.name}/ID/images with {place.name}/ID/masks"
    return ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists the files. A sample folder without an image, or with several, is rejected."""
    folder = need_folder(source)
    items: list[Item] = []
    masks: list[tuple[str, ...]] = []
    for place, split in _places(folder):
        for inner in filter(_is_sample, find_folders(place)):
            name = inner.relative_to(folder).as_posix()
            images = [f"{name}/images/{path}" for path in find_images(inner / "images")]
            problem = None
            if len(images) != 1:
                problem = ("missing image", f"{name}/images has {len(images)} images, not 1")
            origin = images[0] if images else f"{name}/images"
            items.append(Item(make_key(name), origin, None, split, len(masks), problem))
            masks.append(tuple(f"{name}/masks/{path}" for path in find_images(inner / "masks")))
    if not items:
        raise TesseraError(
            f"{source} has no object masks",
            hint="it must be SOURCE/ID/images/x.png with SOURCE/ID/masks/*.png",
        )
    return Source(
        name=folder.resolve().name,
        task="instance_segmentation",
        classes=(options.get("class", "object"),),
        items=items,
        load=partial(load, folder),
        annotate=partial(_annotate, folder, masks),
        files=partial(_files, folder, masks),
    )


def _places(folder: Path) -> list[tuple[Path, Split | None]]:
    """(folder with sample folders, split): the source, and its folders named after a split."""
    places: list[tuple[Path, Split | None]] = [(folder, None)]
    for inner in find_folders(folder):
        match = _STAGE.fullmatch(inner.name)
        split = split_of(match[2]) if match else None
        if split:
            places.append((inner, split))
    return places


def _is_sample(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _annotate(folder: Path, masks: list[tuple[str, ...]], item: Item) -> Objects:
    size = image_size(read_inside(folder, item.origin), item.origin)
    boxes, texts = [], []
    for path in masks[item.row]:
        pixels = np.asarray(open_image(read_inside(folder, path), path).convert("L"))
        check_mask_size(pixels.shape, size, path)
        counts = rle.of_mask(pixels)
        if not rle.area(counts):
            raise SampleError("mask without pixels", f"{path} has no pixel other than 0")
        boxes.append(rle.box(counts, len(pixels)))
        texts.append(rle.write(counts))
    return Objects(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.zeros(len(boxes), np.int64),
        np.zeros(len(boxes), bool),
        tuple(texts),
    )


def _files(folder: Path, masks: list[tuple[str, ...]], item: Item) -> tuple[Path, ...]:
    return (folder / item.origin, *(folder / path for path in masks[item.row]))
