"""On a CUDA device: images that fit are kept on it; batches are pinned or on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.data.card import Card
from pipelines.data.loading.loaders import TrainLoader
from pipelines.interfaces import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
MakeSet = Callable[..., tuple[Path, Card]]


@pytest.mark.parametrize("loader_workers", [0, 2])
@pytest.mark.parametrize("cache", ["none", "memory", "auto"])
def test_batches_do_not_depend_on_where_images_are_cached(
    make_set: MakeSet, cache: str, loader_workers: int
) -> None:
    folder, card = make_set(29)
    world = World(0, 1, "cuda:0")
    options = {"batch_size": 6, "seed": 0, "world": world, "cache": cache}
    loader = TrainLoader(folder, card, card.spec(), loader_workers=loader_workers, **options)
    assert loader.cache_choice.startswith("device" if cache == "auto" else cache)
    for epoch in range(3):
        for step in loader.epoch(epoch):
            image = step.batch["image"]
            on_device = cache == "auto" and epoch > 0
            assert image.is_cuda == on_device
            assert on_device or image.is_pinned()
            assert torch.equal(image[:, 0, 2, 3].long().cpu(), step.batch["index"])
    loader.close()
