"""Small packed data sets, and folders of images to pack.

Torch is imported when a fixture needs it: the process that only hands out the tests to others
doesn't.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from pipelines.data.card import Card


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., tuple[Path, Card]]:
    """Writes a data set of 4 by 4 images whose pixels all have the value of the sample's number
    (modulo 251), in shards of `shard_samples`."""
    from pipelines.data.card import Card, ImageCard
    from pipelines.data.images import encode_png
    from pipelines.data.shards import Packed, write

    def make(count: int, shard_samples: int = 5, name: str = "set") -> tuple[Path, Card]:
        folder = tmp_path / name
        samples = (
            Packed(
                f"s{i:04d}",
                ("png", encode_png(np.full((4, 4), i % 251, np.uint8))),
                ("cls", b"%d" % (i % 3)),
                i % 3,
            )
            for i in range(count)
        )
        split = write(folder, "train", samples, shard_samples=shard_samples)
        image = ImageCard(
            channels=1, min_height=4, max_height=4, min_width=4, max_width=4, mean=(0.5,), std=(1,)
        )
        card = Card(
            name=name,
            task="classification",
            classes=("a", "b", "c"),
            image=image,
            splits={"train": split, "test": split},
        ).sealed()
        (folder / "card.json").write_text(card.to_json())
        return folder, card

    return make


@pytest.fixture
def make_image() -> Callable[..., Path]:
    """Writes an image file and creates its folder."""

    def make(path: Path, seed: int = 0, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = size
        shape = (height, width, 3) if mode == "RGB" else (height, width)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        out = io.BytesIO()
        form = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}.get(
            path.suffix.lower(), path.suffix[1:].upper()
        )
        Image.fromarray(pixels).save(out, format=form)
        path.write_bytes(out.getvalue())
        return path

    return make


@pytest.fixture
def make_folder(make_image: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a source with `count` JPEGs in each of the class folders."""

    def make(root: Path, names: list[str], count: int = 10) -> Path:
        for at, name in enumerate(names):
            for number in range(count):
                make_image(root / name / f"{number:03d}.jpg", seed=1000 * at + number)
        return root

    return make
