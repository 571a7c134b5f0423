"""COCO: images with a JSON file for each split; boxes, polygons, both kinds of run lengths, crowds.

In: a folder with COCO files of any name, found by their content: annotations/instances_val.json,
labels.json beside data/ (FiftyOne), result.json (Label Studio), train/_annotations.coco.json
(Roboflow), train/annotation_coco.json. `file_name` is found in the source in every common form
(`support/image_names.py`). Out: a `Source` for instance segmentation if an object has a
segmentation, else for detection. Classes are the categories in the order of their ids. The name of
the JSON file or of its folder gives the split. T.-Y. Lin et al., "Microsoft COCO: Common Objects in
Context", ECCV 2014.

A box or polygon that exceeds its image by at most half a pixel, as rounded coordinates do, is
clipped; one that exceeds it further is an error. Masks equal those of pycocotools in every pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import Objects
from pipelines.data.importers.support.coco_files import (
    CocoFile,
    Id,
    Row,
    find_coco_files,
    read_coco_file,
    to_id,
)
from pipelines.data.importers.support.coco_masks import read_mask
from pipelines.data.importers.support.image_names import ImageNames, Located
from pipelines.data.importers.support.object_lists import (
    EXIF_OPTION,
    ObjectList,
    open_canvas,
    read_exif_option,
    rotated_box,
)
from pipelines.data.importers.support.reading import (
    SPLIT_ORDER,
    choose,
    load,
    make_keys,
    need_folder,
    no_images,
    read_inside,
    split_of,
)
from pipelines.data.safe_parsers import is_number
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import AmbiguousError, Item, Reading, Source, find_images

NAME = "coco"
TASKS = ("instance_segmentation", "detection")
OPTIONS: Mapping[str, str] = {
    "task": "detection drops the masks; by default they are kept if an object has one",
    "images": "folder that file_name is relative to",
    "train": "JSON file of the split train",
    "val": "JSON file of the split val",
    "test": "JSON file of the split test",
    "unlabelled": "a file without an annotation, where others have some: skip (default) leaves its "
    "images out, empty takes them as images without objects",
    **EXIF_OPTION,
}


class _Image(NamedTuple):
    """An image's row in its file, and the classes of the file's categories."""

    row: Row
    labels: Mapping[Id, int]


def recognises(source: str) -> str:
    files = find_coco_files(Path(source))
    shown = ", ".join(file.path for file in files[:5])
    return f"COCO annotations in {shown}{' …' if len(files) > 5 else ''}" if files else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads the JSON files, of up to 1 GiB each; annotations are checked later, one by one.

    Raises TesseraError for JSON that isn't COCO, and for images that two files list; AmbiguousError
    for keypoints, which no task reads, unless the option task is given.
    """
    folder = need_folder(source)
    files = _given(folder, options) or find_coco_files(folder)
    if not files:
        raise TesseraError(
            f"{source} has no COCO annotations",
            hint="give the JSON files with --option train=FILE, val=FILE and test=FILE",
        )
    if "images" in options and not (folder / options["images"]).is_dir():
        raise UsageError(f"the option images: there is no folder {folder / options['images']}")
    root = folder / options["images"] if "images" in options else folder
    names = ImageNames(root, find_images(root))
    items: list[Item] = []
    images: list[_Image] = []
    orphans: list[tuple[str, str]] = []
    classes: dict[str, int] = {}
    notes = [f"{f.path} has {'the split ' + f.split if f.split else 'no split'}" for f in files]
    listed: dict[str, str] = {}
    keep = choose(options, "unlabelled", ("skip", "empty"), "skip") == "empty"
    for file in files:
        content = read_coco_file(folder, file.path)
        if not content.annotated and len(files) > 1 and not keep:
            notes.append(
                f"{file.path} has {len(content.rows)} images and no annotation: left out; --option "
                "unlabelled=empty takes them as images without objects"
            )
            continue
        orphans += content.orphans
        known = set(classes)
        for number in sorted(content.categories, key=lambda n: (isinstance(n, str), n)):
            classes.setdefault(content.categories[number], len(classes))
        if known and known != set(content.categories.values()):
            notes.append(f"{file.path} has other categories than the files before: all are taken")
        labels = {number: classes[name] for number, name in content.categories.items()}
        places = [""] if "images" in options else _places(file)
        located = names.locate([row.name for row in content.rows], places, file.split)
        for row, (origin, problem) in _join_rows(content.rows, located, file.path, notes):
            _refuse_twice(listed, origin, file.path)
            items.append(Item("", origin, None, file.split, len(images), problem))
            images.append(_Image(row, labels))
    if not items:
        raise no_images(source)
    keys = make_keys([_utf8(item.origin) for item in items])
    items = [replace(item, key=key) for item, key in zip(items, keys)]
    _check_keypoints(source, images, options)
    task = choose(options, "task", TASKS, _task(images, notes))
    exif = read_exif_option(options)
    return Source(
        name=folder.resolve().name,
        task=task,
        classes=tuple(classes),
        items=items,
        load=partial(load, root),
        annotate=partial(_annotate, root, images, task == "instance_segmentation", exif),
        files=partial(_files, root, tuple(folder / file.path for file in files)),
        notes=tuple(notes),
        folder=folder,
        shared_files=tuple(folder / file.path for file in files),
        orphans=tuple(orphans),
    )


def _given(folder: Path, options: Mapping[str, str]) -> list[CocoFile]:
    files = [CocoFile(split, options[split]) for split in SPLIT_ORDER if split in options]
    for file in files:
        if not (folder / file.path).is_file():
            raise UsageError(
                f"there is no file {folder / file.path}", hint="give the JSON file of that split"
            )
    return files


def _places(file: CocoFile) -> list[str]:
    """Folders that a file's names may be relative to, the likeliest first."""
    path = PurePosixPath(file.path)
    words = [path.stem, path.stem.removeprefix("instances_")]
    if file.split:
        words += [w for w in ("train", "val", "valid", "test") if split_of(w) == file.split]
    # From the source down to the folder of the JSON file.
    parents = [*reversed(path.parents)]
    bases = ["" if str(parent) == "." else f"{parent}/" for parent in parents]
    words = list(dict.fromkeys(words[1:] + words[:1]))
    places = [place for base in bases[:1] for place in _below(base, words)]
    places += [bases[-1]] if len(bases) > 1 else []
    places += [place for base in bases[1:] for place in _below(base, words)]
    return list(dict.fromkeys(places))


def _below(base: str, words: Sequence[str]) -> list[str]:
    places = ["", *(f"{word}/" for word in words)]
    return [f"{base}{images}{place}" for images in ("", "images/", "data/") for place in places]


def _refuse_twice(listed: dict[str, str], origin: str, path: str) -> None:
    other = listed.setdefault(origin, path)
    if other != path:
        raise TesseraError(
            f"{origin} is listed in {other} and in {path}",
            hint="an image may only be in one split: name the files to read, for example "
            f"--option train={other}; a missing val and test are taken from train",
        )


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _join_rows(
    rows: Sequence[Row], located: Sequence[Located], path: str, notes: list[str]
) -> list[tuple[Row, Located]]:
    """The rows with their images. Rows of one image, as merged files have them, are one: otherwise
    each would be a sample with a part of the annotations."""
    joined: dict[str, tuple[Row, Located]] = {}
    found = []
    twice = 0
    for row, place in zip(rows, located, strict=True):
        first, _ = joined.setdefault(place.origin, (row, place))
        if first is row or place.problem:
            found.append((row, place))
            continue
        twice += 1
        if (row.height, row.width) != (first.height, first.width):
            why = f"{path} lists {place.origin} twice, with different sizes"
            found.append((row, Located(place.origin, ("listed twice", why))))
            continue
        known = [_content(annotation) for annotation in first.objects]
        first.objects.extend(one for one in row.objects if _content(one) not in known)
    if twice:
        notes.append(
            f"{path} lists {twice} images again under another id: their annotations are joined, "
            "equal ones once"
        )
    return found


def _content(annotation: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in annotation.items() if name not in ("id", "image_id")}


def _check_keypoints(source: str, images: Sequence[_Image], options: Mapping[str, str]) -> None:
    objects = [annotation for image in images for annotation in image.row.objects]
    count = sum(bool(annotation.get("keypoints")) for annotation in objects)
    if not count or "task" in options:
        return
    readings = [Reading(NAME, {**options, "task": TASKS[1]}, "the boxes alone")]
    if any(annotation.get("segmentation") for annotation in objects):
        readings.insert(0, Reading(NAME, {**options, "task": TASKS[0]}, "the masks alone"))
    raise AmbiguousError(
        f"{count} of {len(objects)} objects of {source} have keypoints, which no task reads",
        hint="choose what to take of them: --option task=NAME",
        readings=readings,
    )


def _files(root: Path, jsons: tuple[Path, ...], item: Item) -> tuple[Path, ...]:
    return (root / item.origin, *jsons)


def _task(images: Sequence[_Image], notes: list[str]) -> str:
    objects = [annotation for image in images for annotation in image.row.objects]
    without = sum(not annotation.get("segmentation") for annotation in objects)
    if without == len(objects):
        return "detection"
    if without:
        notes.append(
            f"{without} of {len(objects)} objects have no segmentation, so they are damaged; "
            "--option task=detection takes the boxes of all"
        )
    return "instance_segmentation"


def _annotate(
    root: Path, images: Sequence[_Image], with_masks: bool, exif: str, item: Item
) -> Objects:
    row, labels = images[item.row]
    data = read_inside(root, item.origin)
    canvas = open_canvas(data, item.origin, exif, (row.height, row.width))
    found = ObjectList(canvas, with_masks=with_masks)
    for number, annotation in enumerate(row.objects):
        where = f"{item.origin}: object {number} (id {str(annotation.get('id'))[:50]})"
        category = to_id(annotation.get("category_id"))
        with found.one(None if category is None else labels.get(category)):
            label = _label(annotation, labels, where)
            crowd = _crowd(annotation, where)
            segmentation, box, mask = annotation.get("segmentation"), annotation.get("bbox"), None
            if not segmentation:
                _refuse_rotated(annotation, where)
            if segmentation and (with_masks or box is None):
                mask = read_mask(segmentation, canvas.height, canvas.width, where)
            shape = None if box is None and mask is not None else _box(box, where)
            found.add(label, shape, where, mask=mask, crowd=crowd)
    return found.finish()


def _label(annotation: Mapping[str, Any], labels: Mapping[Id, int], where: str) -> int:
    number = to_id(annotation.get("category_id"))
    if number is None or number not in labels:
        given = str(annotation.get("category_id"))[:50]
        raise SampleError("unknown class", f"{where}: there is no category {given!r}")
    return labels[number]


def _crowd(annotation: Mapping[str, Any], where: str) -> bool:
    value = annotation.get("iscrowd", 0)
    if value not in (0, 1):
        raise SampleError("unreadable annotation", f"{where}: iscrowd is neither 0 nor 1")
    return bool(value)


def _refuse_rotated(annotation: Mapping[str, Any], where: str) -> None:
    """CVAT writes a rotated box as the upright one before its rotation, and the angle beside it."""
    attributes = annotation.get("attributes")
    angle: Any = attributes.get("rotation") if isinstance(attributes, dict) else 0
    if is_number(angle) and angle % 360:
        raise rotated_box(where, angle)


def _box(given: Any, where: str) -> list[float]:
    """Left, top, right, bottom."""
    if not isinstance(given, list) or len(given) != 4 or not all(map(is_number, given)):
        raise SampleError(
            "unreadable annotation", f"{where}: its bbox is not left, top, width and height"
        )
    left, top, width, height = given
    return [float(left), float(top), float(left + width), float(top + height)]
