"""YOLO: a text file for each image, with a class and a normalised box or polygon in each line.

In: images and text files of the same names: images/train/x.jpg with labels/train/x.txt
(Ultralytics), train/images with train/labels (Roboflow), x.txt beside x.jpg (labelImg, Darknet,
CVAT's obj_train_data), x.jpg.txt. Out: a `Source` for instance segmentation if a label is a
polygon, else for detection. Names and splits: `support/yolo_sets.py`; lines:
`support/yolo_lines.py`.

As in YOLO, an image without a text file has no objects. But a split, or a folder, without a single
text file was not annotated, and is left out. Boxes that exceed the image by at most half a pixel
are clipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.core.errors import TesseraError
from pipelines.data import rle
from pipelines.data.annotations import Objects
from pipelines.data.card import Split
from pipelines.data.importers.support.coco_masks import draw
from pipelines.data.importers.support.json_peek import peek
from pipelines.data.importers.support.object_lists import (
    EXIF_OPTION,
    ObjectList,
    open_canvas,
    read_exif_option,
)
from pipelines.data.importers.support.reading import (
    choose,
    load,
    make_keys,
    nearby,
    need_folder,
    no_images,
    read_inside,
    split_of,
)
from pipelines.data.importers.support.yolo_lines import (
    Kind,
    is_label,
    parse_line,
    split_line,
    tell_kind,
)
from pipelines.data.importers.support.yolo_sets import (
    Settings,
    Splits,
    pair_texts,
    read_names,
    read_settings,
)
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import AmbiguousError, Item, Reading, Source, find_files, is_image

NAME = "yolo"
TASKS = ("instance_segmentation", "detection")
OPTIONS: Mapping[str, str] = {
    "task": "detection or instance_segmentation; by default that of the labels",
    "classes": "names of the classes, with commas, if no file has them",
    "unlabelled": "images without a text file: empty takes them as images without objects, skip "
    "leaves them out; by default empty, and skip for a split without any text file",
    **EXIF_OPTION,
}
NOTES = "notes.json"
"""Label Studio's file beside classes.txt: the same names again."""
_SAMPLED = 200
"""Label files that are read to tell what kind they are."""


class _Set(NamedTuple):
    """A set's folder, its files relative to it, and the text of each image that has one."""

    root: Path
    files: list[str]
    texts: dict[str, str]


def recognises(source: str) -> str:
    if not Path(source).is_dir():
        return ""
    found = _find(source)
    if found is None:
        return ""
    texts = sorted(found.texts.values()) or [p for p in found.files if _is_in_labels(p)]
    lines = _sample_lines(found.root, texts)
    if lines and not any(map(is_label, lines)):
        return ""
    # Without a line the layout has to say what the texts are.
    if not lines and not any(_is_in_labels(path) for path in texts):
        return ""
    where = found.root.name if found.root != Path(source) or not texts else texts[0]
    return f"images and YOLO labels in {where}" if texts else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists the images; text files are read when their images are packed.

    Raises TesseraError for labels with keypoints or rotated boxes, unless the option task says what
    to take of them.
    """
    folder = need_folder(source)
    found = _find(source)
    if found is None:
        raise TesseraError(
            f"{source} has no data set in YOLO format",
            hint="it must be SOURCE/images/train/x.jpg with SOURCE/labels/train/x.txt, or x.txt "
            "beside x.jpg",
        )
    root, files, texts = found
    settings = read_settings(list(dict.fromkeys([root, folder])))
    classes, name_files = read_names(root, options, settings, files)
    splits = Splits(root, settings, files)
    notes = list(splits.notes)
    images = _choose_images(found, splits, options, notes)
    if not images:
        raise _no_pair(source, found)
    kind, task = _tell_task(found, images, options, settings, notes)
    keys = make_keys(images)
    items = [Item(key, path, None, splits.of(path)) for key, path in zip(keys, images)]
    used = {path: texts[path] for path in images if path in texts}
    shared = [root / path for path in (*splits.lists, *name_files)]
    shared += [settings.path] if settings.path else []
    shared += [path for path in (root / NOTES, folder / NOTES) if _is_of_label_studio(path)]
    exif = read_exif_option(options)
    return Source(
        name=folder.resolve().name,
        task=task,
        classes=classes,
        items=items,
        load=partial(load, root),
        annotate=partial(
            _annotate, root, used, len(classes), kind, task == "instance_segmentation", exif
        ),
        files=partial(_files, root, used),
        notes=tuple(notes),
        folder=folder,
        shared_files=tuple(sorted(set(shared))),
    )


def _is_of_label_studio(path: Path) -> bool:
    return path.is_file() and ("categories",) in peek(path).keys


def _find(source: str) -> _Set | None:
    """The set in a source: images with text files. Raises TesseraError if there are several."""
    roots = _find_roots(source)
    if len(roots) > 1:
        raise TesseraError(
            f"{source} has {len(roots)} data sets in YOLO format",
            hint=f"give the folder of one of them, for example {roots[0]}",
        )
    root = roots[0] if roots else _innermost(Path(source))
    files = list(find_files(root))
    if not any(path.lower().endswith(".txt") for path in files):
        return None
    texts = pair_texts(files)
    return _Set(root, files, texts) if texts or roots else None


def _innermost(folder: Path) -> Path:
    """The folder, or the one below that all is in, as archives have it."""
    for _ in range(4):
        entries = [e for e in folder.iterdir() if not e.name.startswith((".", "__MACOSX"))]
        if len(entries) != 1 or not entries[0].is_dir() or split_of(entries[0].name):
            break
        folder = entries[0]
    return folder


def _find_roots(source: str) -> list[Path]:
    """The folders that have `images` and `labels` with a text file, at most one level down."""
    found = []
    for root in nearby(source, 1):
        places = [root, *(place for place in nearby(str(root), 1)[1:] if split_of(place.name))]
        for place in places:
            labels = place / "labels"
            whole = (place / "images").is_dir() and labels.is_dir()
            if whole and any(path.endswith(".txt") for path in find_files(labels)):
                found.append(root)
                break
    # A split is not a data set of its own.
    found = [root for root in found if root.parent not in found]
    return [Path(source)] if found and all(split_of(root.name) for root in found) else found


def _is_in_labels(path: str) -> bool:
    return path.lower().endswith(".txt") and "labels" in path.split("/")[:-1]


def _choose_images(
    found: _Set, splits: Splits, options: Mapping[str, str], notes: list[str]
) -> list[str]:
    """The images of the set: those with a text, and others of their split and place."""
    unlabelled = choose(options, "unlabelled", ("empty", "skip", ""), "")
    places = {path.rpartition("/")[0] for path in found.texts}
    tops = {parts[: parts.index("images") + 1] for p in places if "images" in (parts := _parts(p))}
    by_split: dict[Split | None, list[str]] = defaultdict(list)
    unlisted = 0
    for path in found.files:
        if not is_image(path):
            continue
        parts = _parts(path)
        near = path.rpartition("/")[0] in places or "images" in parts[:2]
        near = near or any(parts[: len(top)] == top for top in tops)
        if near and splits.has(path):
            by_split[splits.of(path)].append(path)
        elif near:
            unlisted += 1
    if unlisted:
        notes.append(f"{unlisted} images are in no list of the set and are left out")
    chosen = []
    without = 0
    for split, paths in by_split.items():
        bare = [path for path in paths if path not in found.texts]
        if len(bare) == len(paths) and unlabelled != "empty":
            notes.append(
                f"the {len(paths)} images of {split or 'no split'} are without any label file, for "
                f"example {paths[0]}: left out; --option unlabelled=empty takes them as images "
                "without objects"
            )
        elif unlabelled == "skip":
            chosen += [path for path in paths if path in found.texts]
        else:
            chosen += paths
            without += len(bare)
    if without:
        notes.append(f"{without} images have no text file, so no objects")
    return sorted(chosen)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(path.split("/"))


def _no_pair(source: str, found: _Set) -> TesseraError:
    text = next((path for path in found.files if _is_in_labels(path)), None)
    image = next((path for path in found.files if is_image(path)), None)
    if text is None or image is None:
        return no_images(source)
    return TesseraError(
        f"no label file belongs to an image: there are {text} and {image}, for example",
        hint="a label file has the name of its image: images/train/x.jpg and labels/train/x.txt",
    )


def _tell_task(
    found: _Set,
    images: Sequence[str],
    options: Mapping[str, str],
    settings: Settings,
    notes: list[str],
) -> tuple[Kind, str]:
    where, content = settings.where or found.root.name, settings.content
    texts = [found.texts[path] for path in images if path in found.texts]
    lines = _sample_lines(found.root, texts)
    keypoints = content.get("kpt_shape")
    pose = keypoints is not None or content.get("task") == "pose"
    kind, boxes, count = tell_kind(lines, (1, 2) if pose else None)
    if content.get("task") == "obb":
        kind = "four corners"
    given = choose(options, "task", TASKS, "") if "task" in options else ""
    if kind == "keypoints" and given != "detection":
        shown = f"kpt_shape {', '.join(map(str, keypoints))}" if isinstance(keypoints, list) else ""
        raise AmbiguousError(
            f"the labels of {where} are boxes with keypoints{' (' if shown else ''}{shown}"
            f"{')' if shown else ''}, and no task reads keypoints",
            hint="--option task=detection takes the boxes alone, columns 2 to 5",
            readings=[
                Reading(NAME, {**options, "task": "detection"}, "the boxes alone, columns 2 to 5")
            ],
        )
    if kind == "four corners" and not given:
        raise AmbiguousError(
            f"each label of {where} has four corners: rotated boxes (OBB), which no task reads, "
            "or polygons",
            hint="choose one: --option task=instance_segmentation or --option task=detection",
            readings=[
                Reading(NAME, {**options, "task": TASKS[0]}, "they are polygons"),
                Reading(NAME, {**options, "task": TASKS[1]}, "the upright boxes around them"),
            ],
        )
    task = given or TASKS[kind == "boxes"]
    if kind == "polygons" and boxes and task == TASKS[0]:
        notes.append(
            f"{boxes} of the first {count} labels are boxes, others polygons: a box is damaged "
            "here; --option task=detection takes the boxes of all"
        )
    return kind, task


def _sample_lines(root: Path, texts: Sequence[str]) -> list[str]:
    """The lines of label files spread over the set."""
    lines: list[str] = []
    read = 0
    for path in texts[:: max(len(texts) // _SAMPLED, 1)]:
        try:
            new = _lines(root, path)
        except SampleError:
            continue
        lines += new
        read += bool(new)
        if read >= _SAMPLED:
            break
    if not lines:  # those may be the images without objects
        for path in texts[: 20 * _SAMPLED]:
            try:
                lines = _lines(root, path)
            except SampleError:
                continue
            if lines:
                break
    return lines


def _files(root: Path, texts: Mapping[str, str], item: Item) -> tuple[Path, ...]:
    text = texts.get(item.origin)
    return (root / item.origin, *([root / text] if text else []))


def _lines(root: Path, path: str) -> list[str]:
    data = read_inside(root, path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("unreadable annotation", f"{path} is not text: {error}") from None
    return [line for line in text.split("\n") if line.strip()]


def _annotate(
    root: Path,
    texts: Mapping[str, str],
    classes: int,
    kind: Kind,
    with_masks: bool,
    exif: str,
    item: Item,
) -> Objects:
    path = texts.get(item.origin, "")
    lines = _lines(root, path) if path else []
    canvas = open_canvas(read_inside(root, item.origin), item.origin, exif)
    height, width = canvas.height, canvas.width
    scale = np.array([width, height], np.float64)
    found = ObjectList(canvas, with_masks=with_masks)
    for number, line in enumerate(lines):
        where = f"{path}, line {number + 1}"
        with found.one(_known_class(line, classes)):
            label, values = parse_line(line, classes, kind, where)
            corners = values.reshape(-1, 2) * scale
            if len(values) == 4:
                if with_masks:
                    raise SampleError(
                        "unreadable mask", f"{where} is a box, while others are polygons"
                    )
                first, size = corners
                box = [*(first - size / 2), *(first + size / 2)]
                found.add(label, [float(side) for side in box], where)
                continue
            if kind == "boxes" and not with_masks:
                raise SampleError(
                    "unreadable annotation", f"{where} is a polygon, while others are boxes"
                )
            box = [float(side) for side in (*corners.min(0), *corners.max(0))]
            mask = None
            if with_masks:
                mask = draw([corners.ravel().tolist()], height, width, where)
                if not rle.area(mask):
                    raise SampleError("mask without pixels", f"{where}: its mask has no pixel")
            found.add(label, box, where, mask=mask)
    return found.finish()


def _known_class(line: str, classes: int) -> int | None:
    first = split_line(line)[0]
    return int(first) if first.isdigit() and len(first) < 9 and int(first) < classes else None
