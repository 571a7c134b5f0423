"""Images without an annotation, in formats where each labelled image has one.

In: the items that have one, and the other images. Out: items for them, or a note that they are left
out. Must not know any format. Whether such an image has no objects or was never annotated can't be
told from the files, so an option decides; what is left out is listed by the account of the pack.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from pipelines.data.images import make_key
from pipelines.data.importers.support.pairs import split_in_folders, split_path
from pipelines.data.importers.support.reading import choose
from pipelines.data.sources import Item

UNLABELLED_OPTION: Mapping[str, str] = {
    "unlabelled": "images without an annotation: skip (default) leaves them out, empty takes them "
    "as images without objects",
}


def take_unlabelled(
    images: Sequence[str], options: Mapping[str, str], notes: list[str], what: str
) -> Sequence[str]:
    """Those of `images`, which have no `what`, that the option takes; and a note."""
    empty = choose(options, "unlabelled", ("skip", "empty"), "skip") == "empty"
    if not images:
        return ()
    counted = f"{len(images)} images without {what}, for example {images[0]}"
    if empty:
        notes.append(f"{counted}: taken as images without objects")
        return images
    notes.append(
        f"{counted}: left out; --option unlabelled=empty takes them as images without objects"
    )
    return ()


def add_unlabelled(
    items: list[Item],
    images: Sequence[str],
    options: Mapping[str, str],
    notes: list[str],
    what: str,
    *,
    names_only: bool = False,
) -> None:
    """Adds the images that are taken, with the row -1."""
    for image in take_unlabelled(images, options, notes, what):
        name = split_path(image)[1] if names_only else os.path.splitext(image)[0]
        items.append(Item(make_key(os.fsencode(name)), image, None, split_in_folders(image), -1))
