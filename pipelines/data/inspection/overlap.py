"""Test images that a network may have seen before: in the data set it was trained on.

In: the data set of a training and the one of a test, which may be the same. Out: how many images of
the test look like one that was trained on or chosen by. Must not know the network.

A data set that was packed here says itself which of its images look alike. Of two data sets the
images are all compared, by the same fingerprints (`duplicates.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.data import duplicates
from pipelines.data.card import SPLITS, Card
from pipelines.data.images import open_image
from pipelines.data.inspection import survey
from pipelines.data.shards import ShardReader


def seen_before(
    trained: tuple[str | Path, Card], tested: tuple[str | Path, Card], split: str = "test"
) -> int:
    """How many images of the tested split look like one of the other splits of `trained`. Reads
    every image of both, unless it is one data set that was packed here."""
    place, card = tested
    if trained[1].digest == card.digest and not card.root:
        rows = survey.read_pairs(place)
        if len(rows) == card.leakage.near:
            sides = [(row.left, row.right) for row in rows]
            pairs = [*sides, *((right, left) for left, right in sides)]
            return len({one.key for one, other in pairs if one.split == split != other.split})
    known = [
        _fingerprints(trained[0], trained[1], name)
        for name in SPLITS
        if name in trained[1].splits and name != split
    ]
    found = duplicates.find_pairs(
        {"train": np.concatenate(known), "test": _fingerprints(place, card, split)}
    )
    return len({pair.right[1] for pair in found})


def _fingerprints(where: str | Path, card: Card, split: str) -> duplicates.Array:
    """uint8 (N, `duplicates.SIZE`) of a split's images."""
    reader = ShardReader(where, card, split)
    try:
        rows = [
            duplicates.fingerprint(
                open_image(reader.read(number).image, f"{split}, sample {number}")
            )
            for number in range(len(reader))
        ]
    finally:
        reader.close()
    return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, duplicates.SIZE)
