"""A data spec and a batch for each task, for tests that run over every family."""

from __future__ import annotations

import torch

from models.core.family import Batch, DataSpec, Draws, Family
from pipelines import recipe as recipes

CLASSES = ("cat", "dog", "owl", "newt")
SPECS = {
    "classification": DataSpec(
        "classification", 3, 16, 16, CLASSES, (0.5, 0.4, 0.3), (0.3, 0.3, 0.3)
    )
}


def spec(family: Family) -> DataSpec:
    return SPECS[family.task.name]


def raw_batch(family: Family, count: int = 8, seed: int = 0) -> Batch:
    """Images as the loader gives them, with truths of the family's task."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *spec(family).shape)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    batch: Batch = {"image": images, "key": [f"sample-{i}" for i in range(count)]}
    if family.task.name == "classification":
        batch["label"] = torch.arange(count) % len(CLASSES)
    return batch


def train_batch(family: Family, count: int = 8, seed: int = 0) -> Batch:
    """The same after the family's own transform, without random augmentation."""
    settings = recipes.start(family.name, "tiny").augment_settings()
    transform = family.augment(settings, spec(family), train=False)
    return transform(raw_batch(family, count, seed), Draws(seed, count, slice(0, count)))


def tiny(family: Family, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return family.build(family.variants["tiny"], spec(family))
