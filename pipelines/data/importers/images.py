"""Images without labels: for autoencoders, GANs and super-resolution.

In: any folder of images, flat or nested; folders train, val and test are the splits. Out: a
`Source` of the task `images`. It is recognised if no other format is; `--format images` reads any
folder with images.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pipelines.data import importers
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.reading import (
    LABEL_NAMES,
    load,
    need_folder,
    no_images,
    split_of,
)
from pipelines.data.sources import (
    TABLES,
    Item,
    Source,
    find_files,
    find_folders,
    find_images,
    is_image,
)

NAME = "images"
OPTIONS: Mapping[str, str] = {}


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir() or next(find_images(folder), None) is None:
        return ""
    # These names mean that there are labels, even if no format can read them.
    labelled = any(inner.name.lower() in LABEL_NAMES for inner in find_folders(folder))
    labelled |= any(path.lower().endswith(TABLES) for path in find_files(folder))
    others = (importers.get(name) for name in importers.names() if name != NAME)
    if labelled or any(other.recognises(source) for other in others):
        return ""
    return "images without labels"


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists the files. Raises TesseraError if there is no image."""
    folder = need_folder(source)
    files = list(find_files(folder))
    items = [
        Item(make_key(os.path.splitext(path)[0]), path, None, _split(path))
        for path in files
        if is_image(path)
    ]
    if not items:
        raise no_images(source)
    others = len(files) - len(items)
    notes = [f"{others} files without the suffix of an image are left out"] if others else []
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
    )


def _split(path: str) -> Split | None:
    first, _, rest = path.partition("/")
    return split_of(first) if rest else None


def _files(folder: Path, item: Item) -> tuple[Path, ...]:
    return (folder / item.origin,)
