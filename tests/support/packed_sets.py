"""Packed data sets of any task, from images at hand."""

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

Given = tuple[str, Image.Image, Annotation | int | None]
"""A key, an image, and what is said of it: objects, classes of pixels, one class, or nothing."""


def pack_set(
    folder: Path,
    task: str,
    splits: Mapping[str, Sequence[Given]],
    classes: Sequence[str] = (),
    *,
    shard_samples: int = 40,
    rejected: Sequence[Mapping[str, str]] = (),
    pairs: Sequence[Mapping[str, Any]] = (),
    **card: Any,
) -> Card:
    """Writes the data set and gives its card; `rejected` and `pairs` become the files beside it."""
    cards = {}
    for split, given in splits.items():
        counts = np.zeros(len(classes), np.int64)
        for _, _, said in given:
            counts += _count(said, len(classes))
        samples = (_packed(*one) for one in given)
        written = write(folder, split, samples, shard_samples=shard_samples)
        named = dict(zip(classes, counts.tolist()))
        cards[split] = written.model_copy(update={"class_counts": named})
    images = [image for given in splits.values() for _, image, _ in given]
    channels = 3 if any(image.mode == "RGB" for image in images) else 1
    made = Card(
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
    (folder / "card.json").write_text(made.to_json())
    return made


def _count(said: Annotation | int | None, classes: int) -> np.ndarray:
    if isinstance(said, Objects | Mask):
        return np.array(annotations.count(said, classes))
    return np.bincount([] if said is None else [said], minlength=classes)


def _packed(key: str, image: Image.Image, said: Annotation | int | None) -> Packed:
    out = io.BytesIO()
    image.save(out, "PNG")
    picture = ("png", out.getvalue())
    if said is None:
        return Packed(key, picture)
    if isinstance(said, int):
        return Packed(key, picture, ("cls", b"%d" % said), said)
    return Packed(key, picture, annotations.encode(said))


def pair(left: tuple[str, str], right: tuple[str, str], distance: int) -> dict[str, Any]:
    """A line of `near_duplicates.jsonl`, from (split, key) of both."""
    sides = [{"split": s, "key": k, "origin": f"{s}/{k}.png"} for s, k in (left, right)]
    return {"left": sides[0], "right": sides[1], "distance": distance}
