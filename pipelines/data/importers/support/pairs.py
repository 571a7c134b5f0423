"""Pairs label files with the images of the same name.

In: paths of label files and of images, relative to the source. Out: the image of each label file.
Must not know what is in them.

A label file lies beside its image, or in a folder that has a label's name where the image's folder
has an image's: train/labels/x.txt and train/images/x.jpg, annotations/x.xml and images/val/x.jpg.
Only if no file of a folder has an image in one of these places, images of the same name anywhere
are taken, if there is one.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from pipelines.data.card import Split
from pipelines.data.importers.support.reading import IMAGE_NAMES, LABEL_NAMES, split_of

_LABEL_FOLDERS = LABEL_NAMES | {"xml", "xmls", "txt", "json", "jsons", "label_2", "ann", "bbox"}
_IMAGE_FOLDERS = IMAGE_NAMES | {"image_2", "img", "photos", "pictures", "jpg", "data"}


def pair(labels: Iterable[str], images: Iterable[str]) -> dict[str, str]:
    """Label file -> image. No image has two label files of one folder."""
    by_folder: dict[str, dict[str, str]] = defaultdict(dict)
    by_stem: dict[str, list[str]] = defaultdict(list)
    for image in images:
        folder, stem = split_path(image)
        by_folder[folder].setdefault(stem, image)
        by_stem[stem].append(image)
    folders: dict[str, dict[str, str]] = defaultdict(dict)
    for label in labels:
        folder, stem = split_path(label)
        folders[folder][stem] = label
    found: dict[str, str] = {}
    for folder, stems in folders.items():
        taken = _pair_folder(folder, stems, by_folder)
        if not taken:
            taken = _pair_anywhere(folder, stems, by_stem)
        found.update(taken)
    return found


def split_path(path: str) -> tuple[str, str]:
    """(folder, name without suffix in Unicode's composed form)."""
    folder, _, name = path.rpartition("/")
    return folder, unicodedata.normalize("NFC", os.path.splitext(name)[0])


def split_in_folders(path: str) -> Split | None:
    """The split of the innermost folder of a path that is one."""
    return next((s for p in reversed(path.split("/")[:-1]) if (s := split_of(p))), None)


def _pair_folder(
    folder: str, stems: Mapping[str, str], by_folder: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for place in _opposite(folder, by_folder):
        images = by_folder[place]
        for stem in images.keys() & stems.keys():
            found.setdefault(stems[stem], images[stem])
    # One folder of labels for images that lie in several folders: names that occur once.
    below: dict[str, list[str]] = defaultdict(list)
    for place in _below(folder, by_folder):
        for stem in by_folder[place].keys() & stems.keys():
            below[stem].append(by_folder[place][stem])
    for stem, images_of_stem in below.items():
        if len(images_of_stem) == 1:
            found.setdefault(stems[stem], images_of_stem[0])
    return found


def _opposite(folder: str, by_folder: Iterable[str]) -> list[str]:
    """The folder itself, and those with an image's name in place of a label's."""
    parts = folder.split("/") if folder else []
    found = [folder]
    for at in reversed(range(len(parts))):
        if parts[at].lower() in _LABEL_FOLDERS:
            found += [
                other
                for other in sorted(by_folder)
                if _is_image_folder(names := other.split("/"), at)
                and names[:at] == parts[:at]
                and names[at + 1 :] == parts[at + 1 :]
            ]
            if at == len(parts) - 1:  # a folder of labels beside the images
                found.append("/".join(parts[:at]))
    known = set(by_folder)
    return [place for place in dict.fromkeys(found) if place in known]


def _below(folder: str, by_folder: Iterable[str]) -> list[str]:
    """The folders of images, and of splits, beside a folder of labels, and all below them."""
    parts = folder.split("/") if folder else []
    if not parts or parts[-1].lower() not in _LABEL_FOLDERS:
        return []
    at = len(parts) - 1
    return [
        other
        for other in sorted(by_folder)
        if (names := other.split("/"))[:at] == parts[:at]
        and len(names) > at
        and (_is_image_folder(names, at) or split_of(names[at]))
    ]


def _is_image_folder(names: Sequence[str], at: int) -> bool:
    return len(names) > at and names[at].lower() in _IMAGE_FOLDERS


def _pair_anywhere(
    folder: str, stems: Mapping[str, str], by_stem: Mapping[str, list[str]]
) -> dict[str, str]:
    split = split_in_folders(f"{folder}/")
    found = {}
    for stem, label in stems.items():
        images = [i for i in by_stem.get(stem, ()) if split in (None, split_in_folders(i))]
        if len(images) == 1:
            found[label] = images[0]
    return found
