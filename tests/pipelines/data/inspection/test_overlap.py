"""Test images that a network saw while it was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.data.inspection.overlap import seen_before
from pipelines.data.packing import pack

Make = Callable[..., tuple[Path, Card]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(name: str, *, train: range, test: range) -> tuple[Path, Card]:
        """Images that are told apart by their number, in the splits `train` and `test`."""
        for split, numbers in {"train": train, "val": range(900, 904), "test": test}.items():
            for n in numbers:
                file = tmp_path / "photos" / name / split / "ab"[n % 2] / f"{n}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(n).integers(0, 256, (4, 4), np.uint8)
                Image.fromarray(pixels).resize((32, 32)).save(file)
        folder = tmp_path / "data" / name
        pack.pack(str(tmp_path / "photos" / name), str(folder))
        return folder, cards.read(folder)

    return make


@pytest.mark.slow
def test_images_of_another_data_set_are_compared(make: Make) -> None:
    trained = make("trained", train=range(12), test=range(100, 104))
    other = make("other", train=range(200, 206), test=range(300, 304))
    shared = make("shared", train=range(400, 406), test=range(4, 10))
    assert seen_before(trained, trained) == 0
    assert seen_before(trained, other) == 0
    assert seen_before(trained, shared) == 6
