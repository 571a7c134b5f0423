"""Counts test images that have a near duplicate in the data set that a network was trained on.

In: the data sets of a training and of a test, which may be the same. Out: the number of test images
with a near duplicate in another split of the training's data set. Must not know the network.

A data set that was packed here lists its near duplicates. Of two data sets all images are compared,
by the same fingerprints as when packing (`duplicates.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.data import duplicates
from pipelines.data.card import SPLITS, Card
from pipelines.data.image_reading import reading_images
from pipelines.data.images import open_image
from pipelines.data.inspection import lists
from pipelines.data.shards import ShardReader


def seen_before(
    trained: tuple[str | Path, Card], tested: tuple[str | Path, Card], split: str = "test"
) -> int:
    """How many images of the tested split have a near duplicate in another split of `trained`.
    Reads every image of both data sets, unless they are one that was packed here."""
    where, card = tested
    if trained[1].digest == card.digest and not card.root:
        rows = lists.read_pairs(where)
        if len(rows) == card.leakage.near:
            sides = [(row.left, row.right) for row in rows]
            pairs = [*sides, *((right, left) for left, right in sides)]
            return len({one.key for one, other in pairs if one.split == split != other.split})
    known = [
        _fingerprints(trained[0], trained[1], name)
        for name in SPLITS
        if name in trained[1].splits and name != split
    ]
    pairs_across = duplicates.find_pairs(
        {"train": np.concatenate(known), "test": _fingerprints(where, card, split)}
    )
    return len({pair.right[1] for pair in pairs_across})


def _fingerprints(where: str | Path, card: Card, split: str) -> duplicates.Array:
    """uint8 (N, `duplicates.SIZE`) of a split's images."""
    reader = ShardReader(where, card, split)
    try:
        with reading_images(reader.reading):
            rows = [
                duplicates.fingerprint(
                    open_image(reader.read(number).image, f"{split}, sample {number}")
                )
                for number in range(len(reader))
            ]
    finally:
        reader.close()
    return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, duplicates.SIZE)
