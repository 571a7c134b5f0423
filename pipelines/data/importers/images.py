"""Images without labels: for autoencoders, GANs and super-resolution.

In: any folder of images, flat or nested; folders train, val and test are the splits. Out: a
`Source` of the task `images`. It is recognised if nothing in the source could be a label: no file,
and no folder names; `--format images` reads any folder with images.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pipelines.data.card import Split
from pipelines.data.file_kinds import could_be_labels
from pipelines.data.importers.support.reading import (
    IMAGE_NAMES,
    LABEL_NAMES,
    are_classes_in_names,
    load,
    make_keys,
    need_folder,
    no_images,
    split_of,
)
from pipelines.data.sources import (
    Item,
    Source,
    find_files,
    find_images,
    is_image,
)

NAME = "images"
OPTIONS: Mapping[str, str] = {}


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return ""
    paths = []
    for path in find_files(folder):
        if is_image(path):
            paths.append(path)
        elif could_be_labels(path):
            return ""
    folders = {path.rpartition("/")[0] for path in paths}
    names = {name for path in folders for name in path.split("/")}
    # These names mean that there are labels, even if no format can read them.
    if not paths or any(name.lower() in LABEL_NAMES for name in names):
        return ""
    if are_classes_in_names(paths):
        return ""
    others = {_others(path) for path in folders}
    named = {path for path in others if path}
    around = os.path.commonpath(named) if named else ""
    classes = {path[len(around) :].strip("/").split("/")[0] for path in named} - {""}
    splits = {path for path in folders if path and not _others(path)}
    if len(classes) > 1 or (named and splits):
        return ""  # a class each, or images and masks, or parts of one set
    return "images without labels"


def _others(path: str) -> str:
    """The folders in a path that could be classes; empty for `train`, `images/val`."""
    named = (part for part in path.split("/") if not split_of(part))
    return "/".join(part for part in named if part.lower() not in IMAGE_NAMES)


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists the files. Raises TesseraError if there is no image."""
    folder = need_folder(source)
    paths = list(find_images(folder))
    items = [Item(key, path, None, _split(path)) for key, path in zip(make_keys(paths), paths)]
    if not items:
        raise no_images(source)
    notes = []
    folders = {item.origin.split("/")[0] for item in items if "/" in item.origin}
    if len(folders) == 1 and not any(item.split or "/" not in item.origin for item in items):
        notes.append(f"all are in {folders.pop()}: with a single folder there are no classes")
    return Source(
        name=folder.resolve().name,
        task="images",
        classes=(),
        items=items,
        load=partial(load, folder),
        files=partial(_files, folder),
        notes=tuple(notes),
        folder=folder,
    )


def _split(path: str) -> Split | None:
    first, _, rest = path.partition("/")
    return split_of(first) if rest else None


def _files(folder: Path, item: Item) -> tuple[Path, ...]:
    return (folder / item.origin,)
