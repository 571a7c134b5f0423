"""Lists of classes that lie beside masks.

In: a folder. Out: the names of the classes, by colour or by number. Must not know masks.

    class_dict.csv    name,r,g,b                      CamVid on Kaggle
    label_colors.txt  r g b name                      CamVid
    labelmap.txt      name:r,g,b:parts:actions        CVAT, Segmentation mask 1.1
    codes.txt         a name per line, by number      fastai's CamVid
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.data.importers.support.reading import read_inside

FILES = ("class_dict.csv", "label_colors.txt", "labelmap.txt", "codes.txt")
_LINE = re.compile(r"(\d+)\s+(\d+)\s+(\d+)\s+(\S.*)")


@dataclass(frozen=True)
class ClassList:
    """The classes in a file.

    file     the file
    colours  (name, 0xrrggbb) of each class; empty where the file has only names
    names    the names, in order
    """

    file: Path
    colours: tuple[tuple[str, int], ...]
    names: tuple[str, ...]


def find_class_list(folders: Iterable[Path]) -> ClassList | None:
    """The first list of classes in the folders. Raises TesseraError if it can't be read."""
    for folder in folders:
        for name in FILES:
            if (folder / name).is_file():
                return _read(folder, name)
    return None


def _read(folder: Path, name: str) -> ClassList:
    where = str(folder / name)
    try:
        lines = read_inside(folder, name).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise TesseraError(f"{where} is not UTF-8", hint="save it as UTF-8") from None
    if name == "codes.txt":
        names = tuple(line.strip() for line in lines if line.strip())
        return ClassList(folder / name, (), names)
    colours = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            row = _row(name, line)
            if row is not None:
                colours.append(row)
            elif number > 1:  # the first line may be a header
                raise TesseraError(
                    f"{where}, line {number}: {line[:80]!r} is not a class with its colour"
                )
    if len({row[0] for row in colours}) != len(colours):
        raise TesseraError(f"{where} has a name twice", hint="rename one")
    if len({row[1] for row in colours}) != len(colours):
        raise TesseraError(f"{where} has a colour twice", hint="merge the classes")
    return ClassList(folder / name, tuple(colours), tuple(row[0] for row in colours))


def _row(name: str, line: str) -> tuple[str, int] | None:
    """(name, colour) in a line; None for another line."""
    if name == "class_dict.csv":
        cells = [cell.strip() for cell in next(csv.reader([line]), [])]
        label, numbers = (cells[0], cells[1:4]) if len(cells) >= 4 else ("", [])
    elif name == "labelmap.txt":
        label, _, rest = line.partition(":")
        numbers = rest.partition(":")[0].split(",")
    else:
        match = _LINE.fullmatch(line.strip())
        label, numbers = (match[4], [*match.groups()[:3]]) if match else ("", [])
    digits = [int(text) for text in numbers if text.strip().isdecimal() and len(text.strip()) <= 3]
    if not label or len(digits) != 3 or max(digits) > 255:
        return None
    return label, digits[0] << 16 | digits[1] << 8 | digits[2]
