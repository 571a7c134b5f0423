"""Packing of sources with defects.

An invalid sample is rejected with its key and counted. An invalid annotation file is an error that
names it, and nothing is written. An image without objects is valid. The messages of each importer
are in its own tests; all invalid values are in tests/pipelines/data/test_annotations.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sample_sources
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects
from pipelines.data.card import Card
from pipelines.data.images import encode_png
from pipelines.data.inspection import verify
from pipelines.data.packing import pack as packing_pack
from pipelines.data.packing.shard import PackSpec, prepare
from pipelines.data.sample_error import SampleError
from pipelines.data.shards import ShardReader
from pipelines.data.sources import Item, Source

Edit = Callable[[Path], object]


def pack(source: Path, to: Path, **how: Any) -> Card:
    return packing_pack.pack(str(source), to, near_duplicates=False, **how)


class Form(NamedTuple):
    """A format: a function that creates a source, the options of pack, and the key of a sample."""

    make: Callable[[Path], Path]
    task: str
    key: str
    how: dict[str, Any]


FORMS = {
    "coco boxes": Form(
        sample_sources.coco,
        "detection",
        "train2017/000000",
        {"format": "coco", "options": {"task": "detection"}},
    ),
    "coco": Form(sample_sources.coco, "instance_segmentation", "train2017/000000", {}),
    "voc": Form(lambda folder: sample_sources.voc(folder, count=8), "detection", "2007_000000", {}),
    "yolo": Form(sample_sources.yolo, "detection", "images/train/0", {}),
    "yolo polygons": Form(
        lambda folder: sample_sources.yolo(folder, polygons=True),
        "instance_segmentation",
        "images/train/0",
        {},
    ),
    "instance_masks": Form(
        lambda folder: sample_sources.instance_masks(folder, count=6),
        "instance_segmentation",
        "id0",
        {},
    ),
    "masks": Form(
        lambda folder: sample_sources.masks(folder, values=(0, 1, 2, 255), count=12),
        "semantic_segmentation",
        "images/0",
        {"options": {"classes": "no,yes,perhaps"}},
    ),
    "csv": Form(sample_sources.table, "classification", "photos/0", {}),
}
"""At least one format for each kind of annotation."""


def coco(every: bool = False, **changes: Any) -> Edit:
    """Changes the second object of train's first image, or all of its objects."""

    def edit(folder: Path) -> None:
        path = folder / "annotations" / "instances_train2017.json"
        content = json.loads(path.read_text())
        for row in content["annotations"][slice(0, 4) if every else slice(1, 2)]:
            row.update(changes)
        path.write_text(json.dumps(content))

    return edit


def replace(old: str, new: str) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "annotations" / "instances_train2017.json"
        path.write_text(path.read_text().replace(old, new, 1))

    return edit


def voc(name: str, *sides: Any) -> Edit:
    text = sample_sources.voc_xml([("dog", (1, 1, 9, 9), 0), (name, sides, 0)])
    return lambda folder: (folder / "Annotations" / "2007_000000.xml").write_text(text)


def yolo(line: str, first: str = "") -> Edit:
    text = f"{first}{line}\n"
    return lambda folder: (folder / "labels" / "train" / "0.txt").write_text(text)


def mask(make: Callable[[np.ndarray[Any, Any]], bytes], at: str = "masks/0.png") -> Edit:
    def edit(folder: Path) -> None:
        with Image.open(folder / at) as image:
            values = np.asarray(image)
        (folder / at).write_bytes(make(values))

    return edit


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def palette(values: np.ndarray[Any, Any]) -> bytes:
    """A palette image in which the value 2 becomes 77, which is not a class."""
    image = Image.fromarray(np.where(values == 2, 77, values)).convert("P")
    image.putdata(np.where(values == 2, 77, values).ravel().tolist())
    return encoded(image)


def first_row(line: str) -> Edit:
    def edit(folder: Path) -> None:
        lines = (folder / "labels.csv").read_text().splitlines()
        (folder / "labels.csv").write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")

    return edit


def truncate(path: str) -> Edit:
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:-30])


RING = [[1, 2, 3, 4, 99, 6]]
BAD: list[tuple[str, Edit, str]] = [
    *(
        ("coco boxes", edit, reason)
        for edit, reason in (
            (replace("10.5", "1e999"), "box not finite"),
            (coco(bbox=[2, 3, 0, 4]), "box without area"),
            (coco(bbox=[9, 3, -4, 4]), "box inverted"),
            (coco(bbox=[90, 3, 5, 4]), "box outside the image"),
            (coco(bbox=[-2, 3, 5, 4]), "box outside the image"),
            (coco(every=True, bbox=[0.1, 0.1, 0.5, 0.5]), "box normalised"),
            (coco(category_id=-1), "unknown class"),
            (coco(category_id=-100), "unknown class"),
            (coco(category_id=10**30), "unknown class"),
            (coco(category_id="cat"), "unknown class"),
        )
    ),
    ("coco", coco(segmentation=RING), "polygon outside the image"),
    ("coco", coco(segmentation={"size": [9, 9], "counts": [81]}), "mask of another size"),
    ("coco", coco(segmentation=[[1, 2, 1, 2, 1, 2]]), "mask without pixels"),
    ("coco", truncate("train2017/000000.jpg"), "unreadable image"),
    ("voc", voc("cat", "nan", 5, 9, 9), "box not finite"),
    ("voc", voc("cat", "inf", 5, 9, 9), "box not finite"),
    ("voc", voc("cat", 5, 5, 5, 9), "box without area"),
    ("voc", voc("cat", 9, 5, 3, 9), "box inverted"),
    ("voc", voc("cat", 5, 5, 9, 99), "box outside the image"),
    ("voc", voc("cat", -5, 5, 9, 9), "box outside the image"),
    ("voc", voc("", 1, 1, 9, 9), "unknown class"),
    ("voc", truncate("Annotations/2007_000000.xml"), "unreadable annotation"),
    ("yolo", yolo("0 nan 0.5 0.1 0.1"), "unreadable annotation"),
    ("yolo", yolo("0 0.5 0.5 0 0.1"), "box without area"),
    ("yolo", yolo("0 16 12 8 8"), "box outside the image"),
    ("yolo", yolo("-1 0.5 0.5 0.1 0.1"), "unknown class"),
    ("yolo", yolo("9" * 30 + " 0.5 0.5 0.1 0.1"), "unknown class"),
    ("yolo", yolo("cat 0.5 0.5 0.1 0.1"), "unknown class"),
    ("yolo polygons", yolo("0 0.5 0.5 0.1 0.1", "0 0.1 0.1 0.5 0.1 0.5 0.5\n"), "unreadable mask"),
    ("yolo polygons", yolo("2 0.1 0.1 0.5 0.1 0.5 0.5"), "unknown class"),
    (
        "instance_masks",
        mask(lambda values: encode_png(values.T.copy()), "id0/masks/m0.png"),
        "mask of another size",
    ),
    (
        "instance_masks",
        mask(lambda values: encode_png(0 * values), "id0/masks/m0.png"),
        "mask without pixels",
    ),
    ("instance_masks", truncate("id0/masks/m0.png"), "unreadable annotation"),
    ("masks", mask(lambda values: encode_png(values.T.copy())), "mask of another size"),
    ("masks", mask(lambda values: encode_png(values)[:-30]), "unreadable annotation"),
    ("masks", mask(lambda values: encoded(Image.fromarray(values), "JPEG")), "unreadable mask"),
    ("masks", mask(lambda values: encode_png(0 * values + 255)), "mask without pixels"),
    ("masks", lambda folder: (folder / "masks" / "0.png").unlink(), "missing mask"),
    ("csv", first_row("photos/0.jpg,,train"), "missing label"),
    ("csv", truncate("photos/0.jpg"), "unreadable image"),
]


@pytest.mark.fault(20, 21, 26, 27, 29)
@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    BAD,
    ids=[f"{number}-{n}, {r}" for number, (n, _, r) in enumerate(BAD)],
)
def test_an_invalid_sample_is_rejected_with_its_key(
    name: str, edit: Edit, reason: str, tmp_path: Path
) -> None:
    """By default nothing is packed; with one rejection allowed, all other samples are packed."""
    form = FORMS[name]
    source = form.make(tmp_path / "in")
    edit(source)
    with pytest.raises(TesseraError, match=f"{reason}: 1"):
        pack(source, tmp_path / "out", **form.how)
    assert not (tmp_path / "out").exists()
    card = pack(source, tmp_path / "out", allow_rejected="1", **form.how)
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    rejected = json.loads(line)
    assert (rejected["key"], rejected["reason"]) == (form.key, reason)
    assert (card.task, card.rejected) == (form.task, 1)
    assert form.key not in keys(tmp_path / "out", card)
    assert not verify.verify(tmp_path / "out", workers=1).differences


def keys(folder: Path, card: Card) -> list[str]:
    readers = [ShardReader(folder, card, split) for split in card.splits]
    return [reader.read(number).key for reader in readers for number in range(len(reader))]


@pytest.mark.parametrize("name", FORMS)
def test_the_unchanged_source_is_packed(name: str, tmp_path: Path) -> None:
    """Control of the test above."""
    form = FORMS[name]
    card = pack(form.make(tmp_path / "in"), tmp_path / "out", **form.how)
    assert (card.task, card.rejected) == (form.task, 0)
    assert form.key in keys(tmp_path / "out", card)


@pytest.mark.fault(27)
def test_boxes_without_masks_are_refused_for_instance_segmentation(tmp_path: Path) -> None:
    """Otherwise they would be trained on as objects without pixels."""
    boxes = Objects(np.array([[1.0, 2, 5, 9]]), np.array([0]), np.array([False]))
    image_bytes = sample_sources.png(sample_sources.noise(0))
    for task in ("detection", "instance_segmentation"):
        source = Source("x", task, ("a",), (), lambda item: image_bytes, lambda item: boxes)
        spec = PackSpec(source, str(tmp_path), None, "plan")
        if task == "detection":
            prepare(spec, Item("k", "k.png"))
            continue
        with pytest.raises(SampleError, match=r"k\.png: its objects have boxes and no masks"):
            prepare(spec, Item("k", "k.png"))


@pytest.mark.fault(24, 27)
@pytest.mark.parametrize(
    "make",
    [
        lambda values: encoded(Image.fromarray(values.astype(np.uint16) * 1000)),
        lambda values: encode_png(values + (values == 2)),
        palette,
    ],
    ids=["16 bits", "grey", "palette"],
)
def test_mask_values_without_a_class_are_refused(
    make: Callable[[np.ndarray[Any, Any]], bytes], tmp_path: Path
) -> None:
    """The classes are inferred from all masks, so nothing is packed."""
    form = FORMS["masks"]
    source = form.make(tmp_path / "in")
    mask(make)(source)
    with pytest.raises(TesseraError, match="value"):
        pack(source, tmp_path / "out", **form.how)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "edit",
    [
        replace("10.5", "NaN"),
        replace('"images"', '"images": [], "images"'),
        lambda folder: _json(folder).write_bytes(b'{"images":' * 200_000),
        lambda folder: _json(folder).write_bytes(b""),
    ],
    ids=["NaN", "duplicate key", "deeply nested", "empty"],
)
def test_invalid_json_is_refused_with_its_file_name(edit: Edit, tmp_path: Path) -> None:
    form = FORMS["coco"]
    source = form.make(tmp_path / "in")
    edit(source)
    with pytest.raises(TesseraError, match=r"instances_train2017\.json"):
        pack(source, tmp_path / "out", format="coco", options=form.how.get("options"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def _json(folder: Path) -> Path:
    return folder / "annotations" / "instances_train2017.json"


def remove_objects(folder: Path) -> None:
    content = json.loads(_json(folder).read_text())
    first = content["images"][0]["id"]
    kept = [row for row in content["annotations"] if row["image_id"] != first]
    _json(folder).write_text(json.dumps({**content, "annotations": kept}))


NEGATIVE: dict[str, Edit] = {
    "coco boxes": remove_objects,
    "coco": remove_objects,
    "voc": lambda folder: (folder / "Annotations" / "2007_000000.xml").write_text(
        sample_sources.voc_xml([])
    ),
    "yolo": yolo(""),
    "yolo polygons": lambda folder: (folder / "labels" / "train" / "0.txt").unlink(),
    "instance_masks": lambda folder: [p.unlink() for p in (folder / "id0/masks").iterdir()],
}


@pytest.mark.fault(29)
@pytest.mark.parametrize("name", NEGATIVE)
def test_an_image_without_objects_is_packed_as_a_negative(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    source = form.make(tmp_path / "in")
    whole = pack(source, tmp_path / "whole", **form.how)
    NEGATIVE[name](source)
    card = pack(source, tmp_path / "out", **form.how)
    assert card.rejected == 0
    assert form.key in keys(tmp_path / "out", card)
    counted, before = (
        sum(sum(split.class_counts.values()) for split in c.splits.values()) for c in (card, whole)
    )
    assert 0 < counted < before


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("coco boxes", "train2017/000001.jpg", "val2017/000000.jpg"),
        ("coco", "train2017/000001.jpg", "val2017/000000.jpg"),
        ("voc", "JPEGImages/2007_000000.jpg", "JPEGImages/2007_000001.jpg"),
        ("yolo", "images/train/1.jpg", "images/val/0.jpg"),
        ("csv", "photos/0.jpg", "photos/1.jpg"),
    ],
)
def test_an_image_in_two_splits_is_rejected_in_every_format(
    name: str, one: str, other: str, tmp_path: Path
) -> None:
    """The same pixels in another encoding; the annotations may differ."""
    form = FORMS[name]
    source = form.make(tmp_path / "in")
    with Image.open(source / one) as image:
        (source / other).write_bytes(encoded(image))
    with pytest.raises(TesseraError, match="image in two splits: 1"):
        pack(source, tmp_path / "out", **form.how)
    card = pack(source, tmp_path / "out", allow_rejected="1", **form.how)
    rejected = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert rejected["origin"] == one, "the image of train must be rejected"
    assert card.rejected == 1


@pytest.mark.fault(30)
def test_a_class_without_train_objects_is_reported(tmp_path: Path) -> None:
    """It is refused for classification only. A rare class of objects may be missing in train; it
    keeps its index in every split."""
    form, messages = FORMS["coco"], list[str]()
    source = form.make(tmp_path / "in")
    content = json.loads(_json(source).read_text())
    for row in content["annotations"]:
        row["category_id"] = 3
    _json(source).write_text(json.dumps(content))
    card = pack(source, tmp_path / "out", notify=messages.append, **form.how)
    assert card.classes == ("dog", "emu", "cat")
    assert card.splits["train"].class_counts["cat"] == 0 < card.splits["val"].class_counts["cat"]
    assert any("no train image has the class 'cat'" in line and "val" in line for line in messages)
