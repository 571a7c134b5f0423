"""Random crops: torchvision's boxes, drawn by sample and epoch alone, and their pixels."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.core.errors import UsageError
from models.core.family import DataSpec, RandomCrop
from pipelines.data import shards
from pipelines.data.card import Card, ImageCard
from pipelines.data.images import resize
from pipelines.data.loading.crops import (
    TRIES,
    Box,
    EpochCrops,
    choose_box,
    cut_out,
    view_of,
)
from pipelines.data.loading.loaders import TrainLoader
from pipelines.data.shards import Packed
from pipelines.interfaces import World

CROP = RandomCrop()
SIZES = [(375, 500), (500, 375), (32, 32), (7, 300), (300, 7), (1, 1), (2, 3)]


@pytest.mark.parametrize(
    "crop", [RandomCrop(), RandomCrop((0.9, 1.0), (2.0, 3.0)), RandomCrop((1.0, 1.0), (1.0, 1.0))]
)
@pytest.mark.parametrize("size", SIZES)
def test_the_boxes_are_torchvisions(
    crop: RandomCrop, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both choose with the same random numbers."""
    from torchvision.transforms.v2 import RandomResizedCrop

    rng = np.random.default_rng(size)
    theirs = RandomResizedCrop(8, scale=crop.scale, ratio=crop.ratio)
    numbers: list[float] = []
    tries: Iterator[list[float]] = iter([])

    def uniform(self: torch.Tensor, low: float, high: float) -> torch.Tensor:
        if len(numbers) % 4 in (0, 2) and len(numbers) != 4:  # a new try
            numbers[:] = next(tries)
        return torch.tensor([low + numbers.pop(0) * (high - low)], dtype=torch.float64)

    def randint(low: int, high: int, size: Any) -> torch.Tensor:
        return torch.tensor([low + int(numbers.pop(0) * (high - low))])

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(torch, "randint", randint)
    for _ in range(20):
        drawn = rng.random((TRIES, 4))
        numbers.clear()
        tries = iter(drawn.tolist())
        expected = theirs.make_params([torch.empty(3, *size)])
        assert choose_box(crop, size, drawn)._asdict() == expected


def test_a_box_depends_on_seed_epoch_and_sample_alone() -> None:
    crops = EpochCrops(RandomCrop(), 3, 5)
    boxes = {sample: crops(sample, (375, 500)) for sample in range(50)}
    again = EpochCrops(RandomCrop(), 3, 5)
    assert {s: again(s, (375, 500)) for s in reversed(range(50))} == boxes
    assert len(set(boxes.values())) == 50
    for other in (EpochCrops(RandomCrop(), 3, 6), EpochCrops(RandomCrop(), 4, 5)):
        assert not any(other(s, (375, 500)) == boxes[s] for s in range(50))


def test_the_numbers_are_the_stream_of_philox() -> None:
    crops = EpochCrops(RandomCrop(), 3, 5)
    key = int.from_bytes(hashlib.sha256(b"crops\0" + b"3\0" + b"5").digest()[:16], "little")
    for sample in (0, 7, 2**40):
        stream = np.random.Philox(key=key, counter=[0, sample, 0, 0])
        raw = stream.random_raw(TRIES * 4).reshape(TRIES, 4)
        assert np.array_equal(crops.draw(sample), (raw >> np.uint64(11)) / 2.0**53)
    many = np.concatenate([crops.draw(sample) for sample in range(500)])
    assert many.min() >= 0
    assert many.max() < 1
    assert np.allclose(many.mean(0), 0.5, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"scale": (0.0, 1.0)}, "crop_scale"),
        ({"scale": (0.5, 0.4)}, "crop_scale"),
        ({"scale": (0.5, 1.5)}, "crop_scale"),
        ({"ratio": (0.0, 1.0)}, "crop_ratio"),
        ({"ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"ratio": (1.0, float("inf"))}, "crop_ratio"),
        ({"ratio": (1.0, float("nan"))}, "crop_ratio"),
    ],
)
def test_impossible_crops_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match=name):
        RandomCrop(**settings)


@pytest.mark.parametrize(
    ("box", "shown", "shrink"),
    [
        (Box(0, 0, 672, 672), Box(0, 0, 672, 672), 2),
        (Box(9, 9, 674, 900), Box(8, 8, 676, 902), 2),
        (Box(9, 9, 671, 900), Box(9, 9, 671, 900), 1),
        (Box(9, 9, 900, 671), Box(9, 9, 900, 671), 1),
        (Box(10, 20, 2991, 2981), Box(8, 16, 2993, 2985), 8),
        (Box(5, 0, 1400, 3000), Box(4, 0, 1404, 3000), 4),
        (Box(0, 0, 100, 100), Box(0, 0, 100, 100), 1),
    ],
)
def test_an_image_is_shrunk_only_where_the_view_is_smaller(
    box: Box, shown: Box, shrink: int
) -> None:
    assert view_of(box, (3001, 3001), 224, 224) == (shown, shrink)


def test_a_small_box_is_cut_from_the_whole_image() -> None:
    assert view_of(Box(1, 1, 15, 15), (99, 99), 1, 1) == (Box(1, 1, 15, 15), 1)
    assert view_of(Box(1, 1, 16, 16), (99, 99), 1, 1) == (Box(0, 0, 24, 24), 8)


def test_the_pixels_are_those_in_the_box() -> None:
    image = torch.arange(3 * 20 * 30, dtype=torch.int64).remainder(251).to(torch.uint8)
    image = image.view(20, 30, 3).permute(2, 0, 1)
    box = Box(3, 5, 10, 12)
    assert torch.equal(cut_out(image, box, 10, 12), image[:, 3:13, 5:17])
    expected = resize(image[:, 3:13, 5:17].contiguous(), 7, 9)
    assert torch.equal(cut_out(image, box, 7, 9), expected)


@pytest.mark.parametrize(
    ("box", "shown"),
    [
        (Box(2, 4, 10, 12), (slice(1, 6), slice(2, 8))),
        (Box(3, 5, 10, 12), (slice(2, 7), slice(3, 9))),
        (Box(18, 24, 1, 5), (slice(9, 10), slice(12, 15))),
        (Box(0, 0, 19, 29), (slice(0, 10), slice(0, 15))),
    ],
)
def test_a_box_is_rounded_to_the_pixels_of_a_smaller_image(
    box: Box, shown: tuple[slice, slice]
) -> None:
    """Of an image of 19 by 29 pixels, of which the last row and column stand for one pixel."""
    half = torch.randint(256, (3, 10, 15), dtype=torch.uint8)
    part = half[:, shown[0], shown[1]]
    assert torch.equal(cut_out(half, box, *part.shape[-2:], (0.5, 0.5)), part)


def photo(height: int, width: int, seed: int) -> Image.Image:
    """Smooth shapes and a little noise, in colour."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth.astype(int) + rng.integers(-8, 9, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, form: str, orientation: int = 1) -> tuple[str, bytes]:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(out, form, exif=exif, **({"quality": 92} if form == "JPEG" else {}))
    return {"JPEG": "jpg", "PNG": "png"}[form], out.getvalue()


def make(folder: Path, images: list[tuple[str, bytes]], side: tuple[int, int]) -> Card:
    """A data set of these files, with the class 0."""
    samples = [Packed(f"s{i:03d}", file, ("cls", b"0"), 0) for i, file in enumerate(images)]
    split = shards.write(folder, "train", samples, shard_samples=3)
    split = split.model_copy(update={"class_counts": {"a": len(samples)}})
    return Card(
        name="photos",
        task="classification",
        classes=("a",),
        image=ImageCard(
            channels=3,
            min_height=min(side),
            max_height=max(side),
            min_width=min(side),
            max_width=max(side),
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
        ),
        splits={"train": split},
    ).sealed()


def views(
    folder: Path, card: Card, spec: DataSpec, crop: RandomCrop = CROP, **more: Any
) -> dict[int, torch.Tensor]:
    """The view of each sample in epoch 2."""
    loader = TrainLoader(folder, card, spec, batch_size=4, seed=3, world=World(), crop=crop, **more)
    steps = list(loader.epoch(2))
    loader.close()
    return {i: v for s in steps for i, v in zip(s.batch["index"].tolist(), s.batch["image"])}


SHRUNK_TOLERANCE = 2.0
"""Mean absolute difference, of 255, of a view of an image that is shrunk while it is decoded."""


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_view_of_a_shrunk_jpeg_is_nearly_that_of_the_whole(
    tmp_path: Path, orientation: int
) -> None:
    """A turned JPEG is decoded by Pillow, others by the fast decoder. The PNG has the JPEG's own
    pixels."""
    files = [encode(photo(192, 264, seed), "JPEG", orientation) for seed in range(8)]
    whole = [encode(Image.open(io.BytesIO(data)), "PNG", orientation) for _, data in files]
    crop = RandomCrop((0.5, 1.0))
    results = []
    for name, images in (("jpeg", files), ("png", whole)):
        card = make(tmp_path / name, images, (192, 264))
        results.append(views(tmp_path / name, card, card.spec(32, 32), crop))
    for sample, view in results[0].items():
        assert view.shape == (3, 32, 32)
        gap = (view.int() - results[1][sample].int()).abs().float().mean()
        assert 0 < gap < SHRUNK_TOLERANCE


def test_views_of_small_jpegs_equal_those_of_their_pixels(tmp_path: Path) -> None:
    files = [encode(photo(40, 60, seed), "JPEG") for seed in range(5)]
    whole = [encode(Image.open(io.BytesIO(data)), "PNG") for _, data in files]
    results = []
    for name, images in (("jpeg", files), ("png", whole)):
        card = make(tmp_path / name, images, (40, 60))
        results.append(views(tmp_path / name, card, card.spec(32, 32)))
    for sample, view in results[0].items():
        assert torch.equal(view, results[1][sample])


@pytest.mark.parametrize(("size", "loader_workers"), [(1, 2), (2, 0), (3, 1)])
def test_views_don_t_depend_on_ranks_processes_and_resumes(
    tmp_path: Path, size: int, loader_workers: int
) -> None:
    card = make(tmp_path, [encode(photo(40, 60, i), "JPEG") for i in range(10)], (40, 60))
    spec = card.spec(16, 16)

    def loader(rank: int, size: int, workers: int) -> TrainLoader:
        return TrainLoader(
            tmp_path,
            card,
            spec,
            batch_size=4,
            seed=3,
            world=World(rank, size),
            crop=RandomCrop(),
            loader_workers=workers,
        )

    alone = [list(loader(0, 1, 0).epoch(epoch)) for epoch in (0, 1)]
    for sample, view in enumerate(alone[0][0].batch["image"]):
        assert not torch.equal(view, alone[1][0].batch["image"][sample])
    loaders = [loader(rank, size, loader_workers) for rank in range(size)]
    for epoch, consumed in ((0, 0), (1, 4)):
        ranks = [list(one.epoch(epoch, consumed)) for one in loaders]
        for whole, *parts in zip(alone[epoch][consumed // 4 :], *ranks, strict=True):
            for part in parts:
                assert torch.equal(part.batch["image"], whole.batch["image"][part.rows])
                assert torch.equal(part.batch["size"], whole.batch["size"][part.rows])
                assert part.batch["size"].tolist() == [[40, 60]] * len(part.batch["key"])
                assert part.batch["extent"].tolist() == [[16, 16]] * len(part.batch["key"])
    for one in loaders:
        one.close()
