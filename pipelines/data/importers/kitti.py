"""KITTI's object detection: a text file for each image, with a line for each object.

In: training/image_2/000000.png with training/label_2/000000.txt, or any folders of images and
labels of the same names, as NVIDIA's tools write. Out: a `Source` for detection. Classes are the
names that occur, in alphabetical order. A. Geiger et al., "Are we ready for Autonomous Driving? The
KITTI Vision Benchmark Suite", CVPR 2012.

A line has 15 words, 16 with a score: class, truncation, occlusion, angle, the box as left, top,
right, bottom in pixels from 0, then the object in space, which is not read. DontCare regions have
no class; they are left out, with a note. Images without a text file are left out unless the option
unlabelled takes them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.data.importers.support.pairs import pair, split_in_folders
from pipelines.data.importers.support.reading import need_folder, read_inside
from pipelines.data.importers.support.shapes import SHAPE_OPTIONS, Shape, ShapedImage, make_source
from pipelines.data.importers.support.unlabelled import UNLABELLED_OPTION, take_unlabelled
from pipelines.data.sources import Source, find_files, is_image

NAME = "kitti"
OPTIONS: Mapping[str, str] = {
    **{name: text for name, text in SHAPE_OPTIONS.items() if name != "task"},
    **UNLABELLED_OPTION,
}
_WORDS = (15, 16)
_NUMBER = re.compile(r"[-+]?[0-9]{1,12}(\.[0-9]{0,40})?([eE][-+]?[0-9]{1,3})?", re.ASCII)
_DONT_CARE = "dontcare"
_PEEKED = 32


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return ""
    files = list(find_files(folder))
    texts = [path for path in files if path.lower().endswith(".txt")]
    pairs = pair(texts, (path for path in files if is_image(path)))
    read = 0
    for path in sorted(pairs):
        lines = _lines(folder, path)
        if any(map(_is_object, lines)):
            return f"KITTI labels in {path}"
        read += bool(lines)
        if read >= _PEEKED:
            break
    return ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads all text files."""
    folder = need_folder(source)
    files = list(find_files(folder))
    pictures = [path for path in files if is_image(path)]
    texts = [path for path in files if path.lower().endswith(".txt")]
    pairs = sorted(pair(texts, pictures).items())
    if not pairs:
        raise TesseraError(
            f"{source} has no labels in KITTI's format",
            hint="they are text files with the names of the images: training/label_2/000000.txt "
            "and training/image_2/000000.png",
        )
    images, regions = [], 0
    for path, origin in pairs:
        lines = _lines(folder, path)
        kept = [(n, line) for n, line in enumerate(lines, 1) if _first(line) != _DONT_CARE]
        regions += len(lines) - len(kept)
        shapes = tuple(_shape(line, f"{path}, line {number}") for number, line in kept)
        images.append(ShapedImage(origin, shapes, split_in_folders(origin), files=(path,)))
    notes = [f"{regions} DontCare regions have no class and are left out"] if regions else []
    labelled = {image.origin for image in images}
    places = {os.path.dirname(origin) for origin in labelled}
    without = [p for p in pictures if os.path.dirname(p) in places and p not in labelled]
    taken = take_unlabelled(without, options, notes, "text file")
    images += [ShapedImage(path, split=split_in_folders(path)) for path in taken]
    return make_source(folder, images, options, notes=notes)


def _lines(folder: Path, path: str) -> list[str]:
    text = read_inside(folder, path).decode("utf-8-sig", "replace")
    return [line for line in text.split("\n") if line.strip()]


def _first(line: str) -> str:
    return line.split()[0].lower()


def _is_object(line: str) -> bool:
    name, *rest = line.split()
    return (
        len(rest) + 1 in _WORDS
        and not _NUMBER.fullmatch(name)
        and all(map(_NUMBER.fullmatch, rest))
    )


def _shape(line: str, where: str) -> Shape:
    name, *rest = line.split()
    where = f"{where} ({name[:50]})"
    if not name.isprintable():
        return Shape("", where, problem=("unknown class", f"{where} has no class"))
    if len(rest) + 1 not in _WORDS or not all(map(_NUMBER.fullmatch, rest)):
        reason = f"{where} is not a class and 14 numbers, but {len(rest) + 1} words"
        return Shape(name, where, problem=("unreadable annotation", reason))
    box = tuple(float(word) for word in rest[3:7])
    if not all(map(math.isfinite, box)):
        return Shape(name, where, problem=("box not finite", f"{where} has an infinite box"))
    return Shape(name, where, box)
