"""Packs images and annotations that a test holds in memory, for any task."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data import annotations
from pipelines.data.annotations import Annotation, Mask, Objects
from pipelines.data.card import Card, ImageCard, NearDuplicates
from pipelines.data.shards import Packed, write

Sample = tuple[str, Image.Image, Annotation | int | None]
"""A key, an image, and its annotation: objects, a mask, a class, or None."""


def pack_set(
    folder: Path,
    task: str,
    splits: Mapping[str, Sequence[Sample]],
    classes: Sequence[str] = (),
    *,
    shard_samples: int = 40,
    rejected: Sequence[Mapping[str, str]] = (),
    pairs: Sequence[Mapping[str, Any]] = (),
    **card: Any,
) -> Card:
    """Writes a data set and returns its card; `rejected` and `pairs` are written to their files."""
    cards = {}
    for split, samples in splits.items():
        counts = np.zeros(len(classes), np.int64)
        for _, _, annotation in samples:
            counts += _count(annotation, len(classes))
        packed = (_packed(*sample) for sample in samples)
        written = write(folder, split, packed, shard_samples=shard_samples)
        named = dict(zip(classes, counts.tolist()))
        cards[split] = written.model_copy(update={"class_counts": named})
    images = [image for samples in splits.values() for _, image, _ in samples]
    channels = 3 if any(image.mode == "RGB" for image in images) else 1
    sealed = Card(
        **{"name": folder.name, **card},
        task=task,
        classes=tuple(classes),
        image=ImageCard(
            channels=channels,
            min_height=min(image.height for image in images),
            max_height=max(image.height for image in images),
            min_width=min(image.width for image in images),
            max_width=max(image.width for image in images),
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
        ),
        splits=cards,
        rejected=len(rejected),
        leakage=NearDuplicates(near=len(pairs), images=2 * len(pairs)),
    ).sealed()
    for file, rows in (("rejected.jsonl", rejected), ("near_duplicates.jsonl", pairs)):
        if rows:
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "card.json").write_text(sealed.to_json())
    return sealed


def _count(annotation: Annotation | int | None, classes: int) -> np.ndarray:
    if isinstance(annotation, Objects | Mask):
        return np.array(annotations.count(annotation, classes))
    return np.bincount([] if annotation is None else [annotation], minlength=classes)


def _packed(key: str, image: Image.Image, annotation: Annotation | int | None) -> Packed:
    out = io.BytesIO()
    image.save(out, "PNG")
    encoded = ("png", out.getvalue())
    if annotation is None:
        return Packed(key, encoded)
    if isinstance(annotation, int):
        return Packed(key, encoded, ("cls", b"%d" % annotation), annotation)
    return Packed(key, encoded, annotations.encode(annotation))


def pair(left: tuple[str, str], right: tuple[str, str], distance: int) -> dict[str, Any]:
    """A line of `near_duplicates.jsonl`, from (split, key) of both images."""
    sides = [{"split": s, "key": k, "origin": f"{s}/{k}.png"} for s, k in (left, right)]
    return {"left": sides[0], "right": sides[1], "distance": distance}
