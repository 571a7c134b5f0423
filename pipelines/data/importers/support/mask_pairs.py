"""Finds images and their masks in the folders of a source.

In: a folder. Out: `MaskFolders`, each with its pairs of an image and a mask. Must not know what the
pixels of a mask mean.

A folder of masks is known by a word in its name (`WORDS`): images and masks, train and trainannot,
Training_Input and Training_GroundTruth. Its images are in the folder beside it, of the same split,
with the most matching names. A mask has the name of its image, or that with a suffix that all masks
share. Without such folders x.jpg has its mask beside it, as x_mask.png or as x.png.
"""

from __future__ import annotations

import bisect
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pipelines.data.card import Split
from pipelines.data.importers.support.reading import SPLIT_NAMES, nearby, split_of
from pipelines.data.sources import AmbiguousError, Reading, find_folders, find_images

WORDS = frozenset(
    {
        *("mask", "masks", "label", "labels", "labeled", "labelled", "annotation", "annotations"),
        *("annot", "annots", "gt", "gts", "truth", "groundtruth", "segmentation", "segmentations"),
        *("seg", "segs", "target", "targets", "manual", "labelmaps", "indexlabel"),
    }
)
"""Words in the names of folders with masks."""
_OF_OBJECTS = frozenset({"object", "objects", "instance", "instances", "panoptic"})
IMAGE_WORDS = ("images", "image", "imgs", "img", "jpegimages", "input", "inputs", "original")
"""Names of folders with images, the most common first."""
SUFFIXES = (
    *("_mask", "_masks", "_label", "_labels", "_seg", "-mask", "_segmentation", "_gt", "_GT"),
    *("_annotation", "_groundtruth", "_L", "_P"),
)
"""What is often added to the name of an image for its mask."""
PREFIXES = ("mask_", "gt_", "label_", "seg_")
_IMAGE_SUFFIXES = ("_image", "_img", "_sat", "_rgb", "_leftImg8bit", "_training", "_test")
_LOSSY = frozenset({".jpg", ".jpeg", ".jfif", ".jpe", ".heic", ".heif"})
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_BETWEEN_WORDS = re.compile(r"[\W\d_]+")
_GLUED = re.compile(r"(annots?|annotations?|masks?|labels?|gt)$")
Listed = Callable[[Path], tuple[str, ...]]
"""Lists the images below a folder."""
_VOTERS = 200
"""Images whose names are compared with all masks to find the suffix of the masks."""


@dataclass(frozen=True)
class MaskFolders:
    """A folder of images and its folder of masks; the same folder where they lie beside each other.

    pairs  (image, mask), relative to their folders
    alone  images without a mask
    split  in the names of the folders
    """

    images: Path
    masks: Path
    pairs: list[tuple[str, str]] = field(repr=False)
    alone: list[str] = field(repr=False)
    split: Split | None = None

    @property
    def described(self) -> str:
        where = "beside them" if self.images == self.masks else f"in {self.masks.name}"
        return f"images in {self.images.name} with masks {where}"

    def split_in(self, path: str) -> Split | None:
        """The split of an image: that in the folders of its path, or that of the set."""
        parts = path.split("/")[:-1]
        return next((split for part in reversed(parts) if (split := split_of(part))), self.split)


def find_mask_folders(
    source: str, suffix: str | None = None, *, of_objects: bool = False
) -> list[MaskFolders]:
    """The pairs of folders in a source. `suffix` is what is added to the names of the masks.

    Folders whose names say that their masks number objects count with `of_objects`, before others.
    """
    found: list[MaskFolders] = []
    listed = cache(_list)
    for root in nearby(source):
        if not any(_is_inside(root, folders) for folders in found):
            found += _apart(root, suffix, listed, of_objects)
    if found:
        return found
    for root in nearby(source):
        if not any(root.is_relative_to(folders.images) for folders in found):
            found += _beside(root, suffix, listed)
    return found


def choose_mask_folders(
    format: str, source: str, options: Mapping[str, str], *, of_objects: bool = False
) -> list[MaskFolders]:
    """The folders of images and masks, of which the option `masks` may name some. Raises
    AmbiguousError, with a reading for each choice, if images have masks in several folders."""
    found = find_mask_folders(source, options.get("mask_suffix"), of_objects=of_objects)
    if "masks" in options:
        wanted = options["masks"].strip("/")
        found = [f for f in found if f.masks.relative_to(source).as_posix().endswith(wanted)]
    if several := rivals(found):
        names = [folders.masks.relative_to(source).as_posix() for folders in several]
        raise AmbiguousError(
            f"the images in {several[0].images.name} have masks in {' and in '.join(names)}",
            readings=[
                Reading(format, {**options, "masks": name}, f"the masks are in {name}")
                for name in names
            ],
        )
    return found


def rivals(found: Iterable[MaskFolders]) -> list[MaskFolders]:
    """The first folders that share their images with others, and those; empty if there are none."""
    by_images: dict[Path, list[MaskFolders]] = {}
    for folders in found:
        by_images.setdefault(folders.images, []).append(folders)
    return next((several for several in by_images.values() if len(several) > 1), [])


def names_masks(name: str) -> bool:
    """Whether the name of a folder says that masks of classes are in it."""
    return bool(set(_words(name)) & WORDS) and not _names_objects(name)


def _names_objects(name: str) -> bool:
    return bool(set(_words(name)) & _OF_OBJECTS)


def _words(name: str) -> list[str]:
    words = [word for word in _BETWEEN_WORDS.split(_CAMEL.sub("_", name).lower()) if word]
    for word in words:
        match = _GLUED.search(word)
        if match and word[: match.start()] in SPLIT_NAMES:  # trainannot
            return [*(other for other in words if other != word), word[: match.start()], match[1]]
    return words


def _split_among(name: str) -> Split | None:
    """The split that a word of the name means, whatever its other words are."""
    found = {SPLIT_NAMES[word] for word in _words(name) if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def _is_inside(root: Path, folders: MaskFolders) -> bool:
    return root.is_relative_to(folders.images) or root.is_relative_to(folders.masks)


def _apart(
    root: Path, suffix: str | None, listed: Listed, of_objects: bool
) -> Iterator[MaskFolders]:
    inner = find_folders(root)
    objects = [folder for folder in inner if _names_objects(folder.name)]
    masks = [folder for folder in inner if names_masks(folder.name)]
    images = [folder for folder in inner if folder not in (*masks, *objects)]
    masks = (objects or masks) if of_objects else masks
    images.sort(key=lambda folder: (_image_rank(folder.name), folder.name))
    for folder in masks:
        split = _split_among(folder.name)
        best: MaskFolders | None = None
        for other in images:
            split_here = _split_among(other.name)
            if split and split_here and split != split_here:
                continue
            pairs, alone = _pair(listed(other), listed(folder), suffix)
            if pairs and (best is None or len(pairs) > len(best.pairs)):
                means = split or split_here or split_of(root.name)
                best = MaskFolders(other, folder, pairs, alone, means)
        if best:
            yield best


def _image_rank(name: str) -> int:
    return IMAGE_WORDS.index(name.lower()) if name.lower() in IMAGE_WORDS else len(IMAGE_WORDS)


def _list(folder: Path) -> tuple[str, ...]:
    return tuple(find_images(folder))


def _pair(
    images: Iterable[str], masks: Iterable[str], suffix: str | None
) -> tuple[list[tuple[str, str]], list[str]]:
    """(image, mask) with matching names in the same folders, or else in any; and the images without
    a mask."""
    images, masks = list(images), list(masks)
    pairs, alone = _match(images, masks, suffix)
    if not pairs and any("/" in path for path in [*images, *masks]):
        pairs, alone = _match(images, masks, suffix, across=True)
    return pairs, alone


def _match(
    images: list[str], masks: list[str], suffix: str | None, *, across: bool = False
) -> tuple[list[tuple[str, str]], list[str]]:
    by_stem: dict[str, str] = {}
    for mask in masks:
        stem = _stem(mask, across)
        if across and stem in by_stem:  # names that repeat say nothing without folders
            return [], images
        by_stem.setdefault(stem, mask)
    stems = {image: _bases(_stem(image, across)) for image in images}
    suffixes = [suffix] if suffix is not None else ["", *_vote(stems.values(), by_stem), *SUFFIXES]
    pairs, alone = [], []
    for image, bases in stems.items():
        names = [base + end for end in suffixes for base in bases]
        if suffix is None:
            names += [_prefixed(base, start) for start in PREFIXES for base in bases]
        mask_stem = next((name for name in names if name in by_stem), None)
        if mask_stem is None:
            alone.append(image)
        else:
            pairs.append((image, by_stem[mask_stem]))
    return pairs, alone


def _stem(path: str, across: bool) -> str:
    path = os.path.basename(path) if across else path
    return unicodedata.normalize("NFC", os.path.splitext(path)[0])


def _bases(stem: str) -> list[str]:
    """The stem, and what is left of it without what means an image."""
    return [stem, *(stem.removesuffix(end) for end in _IMAGE_SUFFIXES if stem.endswith(end))]


def _prefixed(stem: str, prefix: str) -> str:
    folder, slash, name = stem.rpartition("/")
    return f"{folder}{slash}{prefix}{name}"


def _vote(stems: Iterable[list[str]], masks: Iterable[str]) -> list[str]:
    """The suffix that most masks have, if half of the images have such a mask."""
    names = sorted(masks)
    votes: Counter[str] = Counter()
    voters = 0
    for bases, _ in zip(stems, range(_VOTERS)):
        voters += 1
        ends = set()
        for base in bases:
            at = bisect.bisect_left(names, base)
            while at < len(names) and names[at].startswith(base):
                end = names[at][len(base) :]
                if end and not end[0].isalnum() and "/" not in end:
                    ends.add(end)
                at += 1
        votes.update(ends)
    return [end for end, count in votes.most_common(1) if 2 * count >= voters]


def _beside(root: Path, suffix: str | None, listed: Listed) -> Iterator[MaskFolders]:
    """Masks in the folder of their images: x_mask.png, or x.png for x.jpg."""
    names = [path for path in listed(root) if "/" not in path]
    suffixes = [suffix] if suffix else SUFFIXES
    stems: dict[str, str] = {}
    for name in names:
        stems.setdefault(os.path.splitext(name)[0], name)
    taken = {stems[stem + end] for stem in stems for end in suffixes if stem + end in stems}
    pairs, alone = [], []
    for stem, name in stems.items():
        mask = next((stems[stem + end] for end in suffixes if stem + end in stems), None)
        if mask:
            pairs.append((name, mask))
        elif name not in taken:
            alone.append(name)
    if not pairs and suffix is None:
        pairs, alone = _by_suffix(names)
    if pairs:
        yield MaskFolders(root, root, pairs, alone, split_of(root.name))


def _by_suffix(names: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """x.jpg with x.png, if that is so for most: JPEG is no format for masks."""
    stems: dict[str, dict[bool, str]] = {}
    for name in names:
        stem, end = os.path.splitext(name)
        stems.setdefault(stem, {}).setdefault(end.lower() in _LOSSY, name)
    pairs = [(files[True], files[False]) for files in stems.values() if len(files) == 2]
    alone = [files[True] for files in stems.values() if False not in files]
    strangers = sum(True not in files for files in stems.values())
    return (pairs, alone) if len(pairs) > len(alone) + strangers else ([], [])
