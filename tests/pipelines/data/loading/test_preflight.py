"""Data that can't feed a training are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import Card
from pipelines.data.loading import preflight


@pytest.fixture
def packed(make_set: Callable[..., tuple[Path, Card]]) -> tuple[Path, Card]:
    return make_set(12, shard_samples=4)


def test_enough_samples_for_the_workers_are_accepted(packed: tuple[Path, Card]) -> None:
    folder, card = packed
    for workers, batch_size in ((0, 1), (1, 1), (12, 12), (3, 1000)):
        preflight.check_feedable(card, workers=workers, batch_size=batch_size, where=folder)


@pytest.mark.fault(15)
def test_too_few_samples_or_missing_shards_are_refused(packed: tuple[Path, Card]) -> None:
    folder, card = packed
    with pytest.raises(UsageError, match="12 train samples are not enough for 13 workers"):
        preflight.check_feedable(card, workers=13, batch_size=26)
    with pytest.raises(UsageError, match="a batch of 2 can't be split over 3 workers"):
        preflight.check_feedable(card, workers=3, batch_size=2)
    with pytest.raises(TesseraError, match="no 'val' split"):
        preflight.check_feedable(card, workers=1, batch_size=2, split="val")
    (folder / "train" / "000001.tar").unlink()
    (folder / "train" / "000002.tar").write_bytes(b"<html>")
    preflight.check_feedable(card, workers=1, batch_size=2)
    with pytest.raises(
        TesseraError,
        match=r"2 of 3 shards .*000001\.tar is missing; .*000002\.tar has 6 bytes, the card says",
    ):
        preflight.check_feedable(card, workers=1, batch_size=2, where=folder)
    (folder / "train" / "index.npy").unlink()
    with pytest.raises(TesseraError, match=r"the index train/index\.npy of .* is missing"):
        preflight.check_feedable(card, workers=1, batch_size=2, where=folder)
