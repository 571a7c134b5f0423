"""Which format a source has.

In: a source, and the format and options that the user gives. Out: the importer and its options.
Must not know how a format is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from models.core.errors import TesseraError, UsageError, unknown
from pipelines.data import image_reading, importers
from pipelines.data.card import SPLITS
from pipelines.data.file_kinds import could_be_labels
from pipelines.data.importers.support.reading import are_classes_in_names, class_in_name
from pipelines.data.packing import label_tools
from pipelines.data.sources import (
    IMAGE_SUFFIXES,
    TABLES,
    AmbiguousError,
    Importer,
    Reading,
    Source,
    find_files,
    find_images,
)

IMAGES = "images"
"""The format of images without labels."""


WITH_BOXES = frozenset({"box_csv", "coco", "cvat", "kitti", "labelme", "voc", "yolo"})
"""The formats that read a file with the boxes of an image, or of all."""
SHOWN_CLASSES = 20
"""How many classes are shown by their names."""


class Format(NamedTuple):
    """The importer of a source and its options. `why` says, for the user, how it was chosen;
    `image_options` are those that say how images are read."""

    name: str
    importer: Importer
    options: dict[str, str]
    why: str
    image_options: dict[str, str] = {}


def choose(source: str, format: str | None, options: Mapping[str, str]) -> Format:
    """The format of `source`: the one that is given, or the only one that recognises it.

    `format` is NAME, `torchvision:CLASS`, or for an importer from outside MODULE or
    MODULE:ATTRIBUTE. Raises UsageError for an unknown format or option.
    """
    name, word, why = format or "", "", "given by --format"
    if not format:
        name, why = recognise(source)
    elif ":" in format and format.partition(":")[0] in importers.names():
        name, _, word = format.partition(":")  # the word is short for the option `name`
    importer = importers.get(name)
    given = {**options, **({"name": word} if word else {})}
    of_images = {
        option: given.pop(option)
        for option in [*given]
        if option in image_reading.OPTIONS
        and option not in importer.OPTIONS
        and hasattr(importer, "read")
    }
    for option in given:
        if option not in importer.OPTIONS:
            if not importer.OPTIONS:
                raise UsageError(f"{name} takes no options", hint=f"leave {option!r} out")
            raise unknown(f"option of {name}", option, importer.OPTIONS)
    return Format(name, importer, given, why, of_images)


def recognise(source: str) -> tuple[str, str]:
    """(format, why) of a source. Raises TesseraError where no format recognises it, AmbiguousError
    where several do."""
    fitting, refused = {}, []
    for name in importers.names():
        try:
            why = importers.get(name).recognises(source)
        except TesseraError as error:  # the source has this format, and is damaged
            refused.append(error)
            continue
        if why:
            fitting[name] = why
    for name in list(fitting):
        for general in getattr(importers.get(name), "MORE_PRECISE_THAN", ()):
            fitting.pop(general, None)
    if refused or len(fitting) > 1:  # a format that finds labels is surer than one that doesn't
        fitting.pop(IMAGES, None)
    if WITH_BOXES & fitting.keys():  # folders of classes would leave the label files unused
        fitting.pop("image_folder", None)
    if "box_csv" in fitting:  # a table of classes would leave the boxes unread
        fitting.pop("csv", None)
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    if refused and not fitting:
        raise refused[0]
    if fitting:
        listed = "; ".join(f"{name} ({why})" for name, why in fitting.items())
        raise AmbiguousError(
            f"{source} could be {listed}",
            hint="choose one: --format NAME",
            readings=[Reading(name, {}, why) for name, why in fitting.items()],
        )
    raise _unrecognised(source)


def describe(source: Source) -> str:
    """What was read: the task, the images of each split, the first classes and, where each image
    has one class, their images."""
    splits: Counter[str] = Counter(item.split or "without a split" for item in source.items)
    names = [name for name in (*SPLITS, "without a split") if splits[name]]
    listed = ", ".join(f"{name} {splits[name]:,}" for name in names)
    labels = Counter(item.label for item in source.items) if source.classes else {}
    counted = source.task == "classification"
    shown = [
        f"{name} {labels[label]:,}" if counted else name
        for label, name in enumerate(source.classes[:SHOWN_CLASSES])
    ]
    more = "" if len(source.classes) <= SHOWN_CLASSES else ", …"
    classes = f"; {len(source.classes):,} classes: {', '.join(shown)}{more}" if shown else ""
    in_splits = "" if names == ["without a split"] else f" ({listed})"
    return f"{source.task.replace('_', ' ')}: {len(source.items):,} images{in_splits}{classes}"


def _unrecognised(source: str) -> TesseraError:
    folder = Path(source)
    if not folder.exists():
        bundled = ", ".join(n for n in importers.names() if importers.get(n).recognises(n))
        return UsageError(
            f"{source} doesn't exist",
            hint=f"give a folder, or the name of a bundled data set: {bundled}",
        )
    if not folder.is_dir():
        if folder.suffix.lower() in TABLES:
            return UsageError(
                f"{source} is not a table of images and labels",
                hint="to see what is wrong with it: --format csv",
            )
        return UsageError(
            f"{source} is a file", hint="give the folder with the images; unpack an archive first"
        )
    if next(find_images(folder), None) is None:
        return TesseraError(f"{source} has no images", hint=image_names_hint())
    labels = [path for path in find_files(folder) if could_be_labels(path)]
    if labels:
        shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3:,} more" if labels[3:] else "")
        tool = label_tools.find_tool(folder, labels)
        looks = f": it looks like an export of {tool.name}; {tool.advice}" if tool else ""
        return AmbiguousError(
            f"{source} has images, and {shown}, which no format recognises as labels{looks}",
            hint="choose a format: --format NAME",
            readings=_label_readings(folder, labels, known=tool is not None),
        )
    if are_classes_in_names(find_images(folder)):
        names = sorted(set(map(class_in_name, find_images(folder))))
        shown = ", ".join(names[:5]) + (", …" if names[5:] else "")
        return AmbiguousError(
            f"{source} has images whose names could have the classes: {shown}",
            hint="choose a format: --format NAME",
            readings=[
                Reading("image_folder", {"class_from": "name"}, f"{len(names)} classes: {shown}"),
                Reading(IMAGES, {}, "images without labels"),
            ],
        )
    return AmbiguousError(
        f"{source} has images in folders that could be classes, splits, parts of one set, or "
        f"images and their masks: {_folders(folder)}",
        hint="choose a format: --format NAME",
        readings=[
            Reading("image_folder", {}, "a folder for each class"),
            Reading(IMAGES, {}, "images without labels"),
        ],
    )


def _label_readings(folder: Path, labels: list[str], *, known: bool) -> list[Reading]:
    """How these labels could be read; those of a known tool can't."""
    readings = []
    if any(path.lower().endswith(TABLES) for path in labels):
        readings.append(Reading("csv", {}, "the labels are in a table; says which columns it has"))
    for path in [] if known else [path for path in labels if path.lower().endswith(".json")]:
        if label_tools.could_be_coco(folder / path):
            readings.append(Reading("coco", {"train": path}, "the labels are COCO annotations"))
            break
    suffixes = dict.fromkeys(os.path.splitext(path)[1] for path in labels)
    patterns = tuple(f"*{suffix}" for suffix in suffixes)
    return [*readings, Reading(IMAGES, {}, "images without labels", patterns)]


def _folders(folder: Path) -> str:
    names = sorted({os.path.dirname(path) for path in find_images(folder)} - {""})
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if names[5:] else "")


def image_names_hint() -> str:
    return f"images are files named {' '.join(sorted(IMAGE_SUFFIXES))}"
