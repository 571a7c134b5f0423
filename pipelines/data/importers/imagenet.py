"""ImageNet as Kaggle has it: synset folders for train, a table for val.

In: SOURCE/LOC_synset_mapping.txt and LOC_val_solution.csv, with images in
ILSVRC/Data/CLS-LOC/train/n01440764 and …/val, or in train and val of SOURCE. Out: a `Source` for
classification; its classes are the synsets in alphabetical order, or their first names with the
option `names`. The boxes are not read. O. Russakovsky et al., "ImageNet Large Scale Visual
Recognition Challenge", IJCV 115, 2015.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.data.importers.support.reading import choose, load, make_keys, need_folder
from pipelines.data.importers.support.tables import read_table
from pipelines.data.sources import Item, Source, find_images, read_file

NAME = "imagenet"
OPTIONS: Mapping[str, str] = {
    "names": "classes are named by their synset, n01440764 (default), or by its first name: words"
}
MORE_PRECISE_THAN = ("csv", "image_folder")
"""Formats that could read a part of the same files."""
MAPPING, SOLUTION, TRAIN = (
    "LOC_synset_mapping.txt",
    "LOC_val_solution.csv",
    "LOC_train_solution.csv",
)
_PLACES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "")
_SYNSET = re.compile(r"n[0-9]{8}")
_MAX_TEXT_BYTES = 64 << 20


def recognises(source: str) -> str:
    folder = Path(source)
    found = [name for name in (MAPPING, SOLUTION) if (folder / name).is_file()]
    return f"synsets in {' and '.join(found)}" if found and _place(folder) else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists the images of train and val. Raises TesseraError if there are no synset folders, or no
    table for the val images."""
    folder = need_folder(source)
    place = _place(folder)
    if place is None:
        raise TesseraError(
            f"{source} has no folder train with synset folders",
            hint="it must be SOURCE/ILSVRC/Data/CLS-LOC/train/n01440764 or SOURCE/train/n01440764",
        )
    start = "" if place == folder else place.relative_to(folder).as_posix() + "/"
    known = _read_solution(folder)
    synsets, paths, items = set(), [], []
    for split in ("train", "val"):
        if (place / split).is_dir():
            paths += [(split, f"{start}{split}/{path}") for path in find_images(place / split)]
    for at, (split, path) in enumerate(paths):
        inner = path.removeprefix(f"{start}{split}/").split("/")
        synset = inner[0] if len(inner) > 1 else known.get(Path(path).stem, "")
        problem = None
        if not _SYNSET.fullmatch(synset):
            problem = ("missing label", f"{path} is in no synset folder, and not in {SOLUTION}")
        items.append((at, split, path, synset, problem))
        synsets.add(synset if problem is None else "")
    ordered = sorted(synsets - {""})
    numbers = {synset: number for number, synset in enumerate(ordered)}
    keys = make_keys([path for _, path in paths])
    used = [folder / name for name in (MAPPING, SOLUTION, TRAIN) if (folder / name).is_file()]
    return Source(
        name=folder.resolve().name,
        task="classification",
        classes=_name_classes(folder, ordered, options),
        items=[
            Item(
                key, path, numbers.get(synset), "train" if split == "train" else "val", at, problem
            )
            for key, (at, split, path, synset, problem) in zip(keys, items)
        ],
        load=partial(load, folder),
        files=partial(_files, folder),
        folder=folder,
        shared_files=tuple(used),
        notes=("the boxes are not read: this format is for classification",),
    )


def _place(folder: Path) -> Path | None:
    """The folder with train, which has synset folders."""
    for name in _PLACES:
        train = folder / name / "train"
        if train.is_dir() and any(_SYNSET.fullmatch(entry.name) for entry in train.iterdir()):
            return folder / name if name else folder
    return None


def _read_solution(folder: Path) -> dict[str, str]:
    """Image id -> synset, from `ILSVRC2012_val_00000001,n01751748 111 108 230 366 …`."""
    if not (folder / SOLUTION).is_file():
        return {}
    table = read_table(folder / SOLUTION)
    if len(table.header) < 2:
        raise TesseraError(f"{SOLUTION} has one column, not ImageId and PredictionString")
    return {row[0]: row[1].split(" ")[0] for row in table.rows}


def _name_classes(folder: Path, synsets: list[str], options: Mapping[str, str]) -> tuple[str, ...]:
    if choose(options, "names", ("synset", "words"), "synset") == "synset":
        return tuple(synsets)
    text = read_file(folder / MAPPING, MAPPING, _MAX_TEXT_BYTES).decode("utf-8", "replace")
    words = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    names = [words.get(synset, synset).split(",")[0].strip() for synset in synsets]
    # Two synsets are called "crane": both keep their number.
    return tuple(
        f"{name} ({synset})" if names.count(name) > 1 else name
        for name, synset in zip(names, synsets)
    )


def _files(folder: Path, item: Item) -> tuple[Path, ...]:
    return (folder / item.origin,)
