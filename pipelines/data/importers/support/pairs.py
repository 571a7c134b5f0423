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
from collections.abc import Iterable, Mapping

from pipelines.data.card import Split
from pipelines.data.importers.support.reading import IMAGE_NAMES, LABEL_NAMES, split_of

_LABEL_FOLDERS = LABEL_NAMES | {"xml", "xmls", "txt", "json", "jsons", "label_2", "ann", "bbox"}
_IMAGE_FOLDERS = IMAGE_NAMES | {"image_2", "img", "photos", "pictures", "jpg", "data"}


def pair(labels: Iterable[str], images: Iterable[str]) -> dict[str, str]:
    """Label file -> image. No image has two label files of one folder."""
    listed = list(images)
    index = _ImageFolders(listed)
    by_stem: dict[str, list[str]] = defaultdict(list)
    for image in listed:
        by_stem[split_path(image)[1]].append(image)
    folders: dict[str, dict[str, str]] = defaultdict(dict)
    for label in labels:
        folder, stem = split_path(label)
        folders[folder][stem] = label
    found: dict[str, str] = {}
    for folder, stems in folders.items():
        found.update(_pair_folder(folder, stems, index) or _pair_anywhere(folder, stems, by_stem))
    return found


def split_path(path: str) -> tuple[str, str]:
    """(folder, name without suffix in Unicode's composed form)."""
    folder, _, name = path.rpartition("/")
    return folder, unicodedata.normalize("NFC", os.path.splitext(name)[0])


def split_in_folders(path: str) -> Split | None:
    """The split of the innermost folder of a path that is one."""
    return next((s for p in reversed(path.split("/")[:-1]) if (s := split_of(p))), None)


class _ImageFolders:
    """The folders of images: stem -> image of each, and which folders stand for which others.

    A set of videos may have thousands of folders, so none is looked at for each of the others.
    """

    def __init__(self, images: Iterable[str]) -> None:
        self.images: dict[str, dict[str, str]] = defaultdict(dict)
        for image in images:
            folder, stem = split_path(image)
            self.images[folder].setdefault(stem, image)
        self._opposite: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._below: dict[str, list[str]] = defaultdict(list)
        for folder in sorted(self.images):
            parts = folder.split("/")
            for at, part in enumerate(parts):
                above, rest = "/".join(parts[:at]), "/".join(parts[at + 1 :])
                if part.lower() in _IMAGE_FOLDERS:
                    self._opposite[above, rest].append(folder)
                    self._below[above].append(folder)
                elif split_of(part):
                    self._below[above].append(folder)

    def opposite(self, folder: str) -> list[str]:
        """The folder itself, and those with an image's name in place of a label's."""
        parts = folder.split("/") if folder else []
        found = [folder]
        for at in reversed(range(len(parts))):
            if parts[at].lower() in _LABEL_FOLDERS:
                above = "/".join(parts[:at])
                found += self._opposite.get((above, "/".join(parts[at + 1 :])), [])
                if at == len(parts) - 1:  # a folder of labels beside the images
                    found.append(above)
        return [place for place in dict.fromkeys(found) if place in self.images]

    def below(self, folder: str) -> list[str]:
        """The folders of images, and of splits, beside a folder of labels, and all below them."""
        above, _, name = folder.rpartition("/")
        return self._below.get(above, []) if name.lower() in _LABEL_FOLDERS else []


def _pair_folder(folder: str, stems: Mapping[str, str], index: _ImageFolders) -> dict[str, str]:
    found: dict[str, str] = {}
    for place in index.opposite(folder):
        images = index.images[place]
        for stem in images.keys() & stems.keys():
            found.setdefault(stems[stem], images[stem])
    # One folder of labels for images that lie in several folders: names that occur once.
    below: dict[str, list[str]] = defaultdict(list)
    for place in dict.fromkeys(index.below(folder)):
        for stem in index.images[place].keys() & stems.keys():
            below[stem].append(index.images[place][stem])
    for stem, several in below.items():
        if len(several) == 1:
            found.setdefault(stems[stem], several[0])
    return found


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
