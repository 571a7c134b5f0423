"""Invalid annotations in packed data sets with valid checksums.

Training and evaluation reject each; the controls show what happens without the checks."""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import examples
import numpy as np
import pytest
import torch
from noise_sets import CLASSES, KINDS, SIDE, annotation, pixels
from PIL import Image

import models
from models.core.errors import TesseraError
from pipelines.data import annotations, rle, shards
from pipelines.data.annotations import IGNORED
from pipelines.data.card import Card, ImageCard
from pipelines.data.images import encode_png
from pipelines.data.inspection import verify
from pipelines.data.loading.loaders import EvalLoader, TrainLoader
from pipelines.data.shards import Packed
from pipelines.interfaces import World


def good(kind: str, number: int) -> Packed:
    image = ("png", encode_png(pixels(number)))
    truth = annotation(kind, number)
    if kind == "classification":
        return Packed(f"s{number}", image, ("cls", b"%d" % truth), truth)
    return Packed(f"s{number}", image, truth and annotations.encode(truth))


def seal(folder: Path, kind: str, changed: Packed | None = None) -> Card:
    """A data set of four samples with matching checksums; the third is `changed`."""
    samples = [good(kind, number) for number in range(4)]
    if changed:
        samples[2] = changed
    split = shards.write(folder, "train", samples, shard_samples=2)
    sides = dict.fromkeys(("min_height", "max_height", "min_width", "max_width"), SIDE)
    image = ImageCard(channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, **sides)
    classes = () if kind == "images" else CLASSES
    card = Card(name="x", task=kind, classes=classes, image=image, splits={"train": split})
    (folder / "card.json").write_text(card.sealed().to_json())
    return card.sealed()


def read(mode: str, folder: Path, card: Card, reads: str | None = None) -> list[Any]:
    """The batches of training or evaluation."""
    spec = card.spec(reads=reads)
    if mode == "evaluation":
        evaluation = EvalLoader(
            folder, card, spec, batch_size=3, world=World(), split="train", cache="none"
        )
        return [batch for _, batch in evaluation.batches()]
    loader = TrainLoader(folder, card, spec, batch_size=3, seed=0, world=World(), cache="none")
    try:
        return [step.batch for step in loader.epoch(0)]
    finally:
        loader.close()


def objects_json(kind: str, **changes: Any) -> bytes:
    """Objects as JSON, with changed fields."""
    fields = json.loads(annotations.encode(annotation(kind, 2))[1])
    kept = {name: value for name, value in {**fields, **changes}.items() if value is not None}
    return json.dumps(kept).encode()


def box(*sides: Any) -> dict[str, Any]:
    return {"boxes": [[1, 2, 9, 12], list(sides)]}


OBJECTS: dict[str, dict[str, Any] | bytes] = {
    "box NaN": box(1, 2, math.nan, 12),
    "box infinite": box(1, -math.inf, 9, 12),
    "box too large for a float": b'{"boxes":[[1,2,9,1e999]],"crowd":[0],"labels":[0]}',
    "box without area": box(5, 2, 5, 12),
    "box inverted": box(9, 2, 1, 12),
    "box outside": box(20, 20, 25, 25),
    "box half outside": box(1, 2, 17, 12),
    "box negative": box(-1, 2, 9, 12),
    "boxes normalised": {"boxes": [[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]]},
    "box of three": box(1, 2, 9),
    "label -1": {"labels": [0, -1]},
    "label -100": {"labels": [0, -100]},
    "unknown label": {"labels": [0, 3]},
    "label of 30 digits": {"labels": [0, 10**30]},
    "label that is a word": {"labels": [0, "cat"]},
    "too few labels": {"labels": [0]},
    "too many labels": {"labels": [0, 1, 2]},
    "too few crowd flags": {"crowd": [0]},
    "duplicate key": b'{"boxes":[],"crowd":[],"labels":[],"labels":[]}',
    "200,000 levels": b"[" * 200_000,
    "empty": b"",
    "not JSON": b"\x89PNG\r\n\x1a\n",
}
EMPTY = rle.write(rle.of_mask(np.zeros((SIDE, SIDE), np.uint8))).decode()
LARGER = rle.write(rle.of_mask(np.ones((SIDE + 1, SIDE), np.uint8))).decode()
INSTANCES = {
    "too few masks": {"masks": [json.loads(objects_json("instance_segmentation"))["masks"][0]]},
    "masks missing": {"masks": None},
    "mask without pixels": {"masks": [EMPTY, EMPTY]},
    "mask of another size": {"masks": [LARGER, LARGER]},
    "invalid run lengths": {"masks": ["\x00", "~"]},
}


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def areas(value: int, height: int = SIDE) -> np.ndarray[Any, Any]:
    mask = np.zeros((height, SIDE), np.uint8)
    mask[3:6, 2:5] = value
    return mask


def damage(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


MASKS: dict[str, bytes] = {
    "of another size": encode_png(areas(1, SIDE + 1)),
    "rotated": encode_png(areas(1, 2 * SIDE).T.copy()),
    "damaged": damage(encode_png(areas(1))),
    "truncated": encode_png(areas(1))[:-15],
    "with an unknown class": encode_png(areas(3)),
    "with an unknown class next to the ignored value": encode_png(areas(254)),
    "with ignored pixels only": encode_png(np.full((SIDE, SIDE), IGNORED, np.uint8)),
    "of 16 bits": encoded(Image.fromarray(areas(1).astype(np.uint16))),
    "of 1 bit": encoded(Image.fromarray(areas(1) > 0)),
    "with a palette": encoded(Image.fromarray(areas(1)).convert("P")),
    "in colour": encode_png(areas(1)[..., None].repeat(3, 2)),
    "transparent": encoded(Image.fromarray(areas(1)), transparency=0),
    "a JPEG": encoded(Image.fromarray(areas(1)), "JPEG"),
    "empty": b"",
}
LABELS = {f"label {label}": label for label in (-1, -100, 3, 2**31 - 1)}


def forged(kind: str, name: str) -> Packed:
    sound = good(kind, 2)
    if kind == "classification":
        label = LABELS[name]
        return sound._replace(note=("cls", b"%d" % label), label=label)
    if kind == "semantic_segmentation":
        return sound._replace(note=("mask.png", MASKS[name]))
    return forged_with(kind, {**OBJECTS, **INSTANCES}[name])


def forged_with(kind: str, content: dict[str, Any] | bytes) -> Packed:
    note = content if isinstance(content, bytes) else objects_json(kind, **content)
    return good(kind, 2)._replace(note=("json", note))


DEFECTS = [
    *(("classification", name) for name in LABELS),
    *(("detection", name) for name in OBJECTS),
    # The same function reads boxes and labels for detection: one case of each is enough.
    *(("instance_segmentation", name) for name in ("box NaN", "label -1", *INSTANCES)),
    *(("semantic_segmentation", name) for name in MASKS),
]


@pytest.mark.fault(20, 24, 26, 27, 28)
@pytest.mark.parametrize(("kind", "name"), DEFECTS, ids=[f"{k}, {n}" for k, n in DEFECTS])
def test_invalid_annotations_are_rejected_when_read(kind: str, name: str, tmp_path: Path) -> None:
    card = seal(tmp_path, kind, forged(kind, name))
    assert not verify.verify(tmp_path, workers=1).differences, "the checksums must be valid"
    for mode in ("training", "evaluation"):
        with pytest.raises(TesseraError, match=r"sample s2\b"):
            read(mode, tmp_path, card)
        assert len(read(mode, tmp_path, card, "images")) == 2, "the images alone must be readable"


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_data_sets_are_read(kind: str, tmp_path: Path) -> None:
    """Control of the test above."""
    card = seal(tmp_path, kind)
    for mode in ("training", "evaluation"):
        assert sum(len(batch["key"]) for batch in read(mode, tmp_path, card)) == 4


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize("name", ["box outside", "label -1", "mask of another size"])
def test_masks_are_checked_when_only_boxes_are_read(name: str, tmp_path: Path) -> None:
    card = seal(tmp_path, "instance_segmentation", forged("instance_segmentation", name))
    for mode in ("training", "evaluation"):
        with pytest.raises(TesseraError, match=r"sample s2\b"):
            read(mode, tmp_path, card, "detection")


@pytest.mark.fault(20, 21, 25)
@pytest.mark.parametrize("change", [damage, lambda data: data[:60], lambda data: b"<html>"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images_are_rejected_when_read(
    kind: str, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    sound = good(kind, 2)
    card = seal(tmp_path, kind, sound._replace(image=("png", change(sound.image[1]))))
    for mode in ("training", "evaluation"):
        with pytest.raises(TesseraError, match=r"the image of sample s2\b"):
            read(mode, tmp_path, card)


@pytest.mark.fault(26)
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("kind", ["detection", "instance_segmentation"])
def test_a_box_without_area_in_float32_is_dropped(kind: str, fit: Any, tmp_path: Path) -> None:
    """It has an area in the shard, which has float64. Losses take the logarithm of the area in
    float32, where it is zero."""
    card = seal(tmp_path, kind, forged_with(kind, box(9, 2, 9.0000001, 12)))
    for side in (SIDE, SIDE - 1):
        loader = EvalLoader(
            tmp_path,
            card,
            card.spec(side, side),
            batch_size=9,
            world=World(),
            split="train",
            fit=fit,
        )
        ((_, batch),) = loader.batches()
        assert [len(boxes) for boxes in batch["boxes"]] == [2, 2, 1, 2]
        assert [len(labels) for labels in batch["labels"]] == [2, 2, 1, 2]
        assert all((boxes[:, 2:] > boxes[:, :2]).all() for boxes in batch["boxes"])


INVALID: dict[str, tuple[list[list[float]], list[int]]] = {
    "NaN": ([[2, 4, math.nan, 25]], [1]),
    "without area": ([[9, 4, 9, 25]], [1]),
    "inverted": ([[19, 25, 2, 4]], [1]),
    "outside": ([[100, 100, 190, 190]], [1]),
    "normalised": ([[0.1, 0.1, 0.5, 0.5]], [1]),
    "label -1": ([[2, 4, 19, 25]], [-1]),
    "label -100": ([[2, 4, 19, 25]], [-100]),
}


@pytest.mark.control(26, 27)
@pytest.mark.parametrize("name", INVALID)
@pytest.mark.parametrize("family", ["yolo", "faster_rcnn", "mask_rcnn"])
def test_without_the_check_families_train_on_invalid_annotations(family: str, name: str) -> None:
    """Silently, or with a loss of NaN. Only YOLO fails: it uses the label as an index."""
    tested = models.get(family)
    (boxes, labels), batch = INVALID[name], examples.train_batch(tested, 2)
    batch["boxes"], batch["labels"] = [torch.tensor(boxes).float()] * 2, [torch.tensor(labels)] * 2
    batch["crowd"] = [torch.zeros(1, dtype=torch.bool)] * 2
    if "masks" in batch:
        batch["masks"] = [torch.zeros(1, *batch["image"].shape[-2:], dtype=torch.uint8)] * 2
    if family == "yolo" and "label" in name:
        with pytest.raises(RuntimeError, match="out of bounds"):
            tested.loss(examples.tiny(tested).train(), batch)
        return
    loss = float(tested.loss(examples.tiny(tested).train(), batch)["loss"].detach())
    not_finite = family != "yolo" and name in ("NaN", "without area", "inverted")
    assert math.isfinite(loss) != not_finite


@pytest.mark.control(24, 27)
def test_without_the_check_masks_are_misread() -> None:
    """Values of 16 bits become 255, which is ignored; a mask with only that value has a loss of
    NaN. An unknown class raises an IndexError that doesn't name the sample."""
    deep = Image.open(io.BytesIO(MASKS["of 16 bits"])).point(lambda value: value * 300)
    assert set(np.asarray(deep.convert("L")).ravel().tolist()) == {0, IGNORED}
    scores = torch.randn(1, 3, SIDE, SIDE)
    loss = functools.partial(torch.nn.functional.cross_entropy, scores, ignore_index=IGNORED)
    assert loss(torch.full((1, SIDE, SIDE), IGNORED)).isnan()
    with pytest.raises(IndexError, match="out of bounds"):
        loss(torch.full((1, SIDE, SIDE), 3))
