"""Packed data sets of white boxes on black, whose annotations follow from the pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.core.family import Batch, DataSpec
from pipelines.data import annotations, rle, shards
from pipelines.data.annotations import Mask, Objects
from pipelines.data.card import Card, ImageCard
from pipelines.data.loading.loaders import EvalLoader
from pipelines.data.shards import Packed
from pipelines.interfaces import World

HEIGHT, WIDTH = 20, 30
CLASSES = ("a", "b", "c")
TASKS = ("classification", "detection", "instance_segmentation", "semantic_segmentation", "images")


def box_image(number: int) -> tuple[np.ndarray, list[int]]:
    """A white box on black, uint8 (H, W), and its left, top, right and bottom."""
    left, top = 2 + number % 9, 3 + number % 5
    right, bottom = left + 8 + number % 7, top + 6 + number % 4
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[top:bottom, left:right] = 255
    return pixels, [left, top, right, bottom]


def annotation_of(task: str, number: int) -> tuple[str, bytes] | None:
    pixels, box = box_image(number)
    if task == "classification":
        return "cls", b"%d" % (number % 3)
    if task == "images":
        return None
    if task == "semantic_segmentation":
        return annotations.encode(Mask((pixels > 0).astype(np.uint8) * (1 + number % 2)))
    masks = (rle.write(rle.of_mask(pixels > 0)),) if task == "instance_segmentation" else None
    count = 0 if number == 4 else 1
    return annotations.encode(
        Objects(
            np.array([box] * count, np.float64).reshape(-1, 4),
            np.full(count, number % 3),
            np.full(count, number == 2),
            masks[:count] if masks is not None else None,
        )
    )


def make(folder: Path, task: str, count: int = 10, form: str = "PNG") -> tuple[Path, Card]:
    """Packs images of boxes with the annotations of a task."""

    def packed() -> Any:
        for number in range(count):
            out = io.BytesIO()
            Image.fromarray(box_image(number)[0]).save(out, form, quality=100)
            image = ("png" if form == "PNG" else "jpg", out.getvalue())
            label = number % 3 if task == "classification" else -1
            yield Packed(f"s{number}", image, annotation_of(task, number), label)

    split = shards.write(folder, "train", packed(), shard_samples=4)
    image = ImageCard(
        channels=1,
        min_height=HEIGHT,
        max_height=HEIGHT,
        min_width=WIDTH,
        max_width=WIDTH,
        mean=(0.5,),
        std=(1,),
    )
    classes = () if task == "images" else CLASSES
    card = Card(name="x", task=task, classes=classes, image=image, splits={"train": split})
    return folder, card.sealed()


def load(folder: Path, card: Card, spec: DataSpec, **options: Any) -> Batch:
    """All samples in order, as one batch."""
    loader = EvalLoader(folder, card, spec, batch_size=99, world=World(), split="train", **options)
    ((_, batch),) = loader.batches()
    return batch
