"""Trains every family's tiny variant for three steps on each rank; see `gloo_ranks.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import examples
import torch
from safetensors.torch import save_file

import models
from pipelines.interfaces import World
from pipelines.training import distributed


def train(world: World, payload: dict[str, Any]) -> None:
    """Leaves each family's weights in `payload["folder"]`."""
    for name in models.names():
        family = models.get(name)
        bare = family.parts(examples.tiny(family, seed=world.rank))  # DDP has to make them equal
        parts = {part: distributed.wrap(module, world) for part, module in bare.items()}
        optimizers = {p: torch.optim.SGD(m.parameters(), lr=0.05) for p, m in bare.items()}
        for step in range(3):
            batch = examples.train_batch(family, seed=10 * step + world.rank)
            for part, losses in family.updates(parts, batch):
                losses["loss"].backward()
                optimizers[part].step()
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
        weights = {
            f"{part}.{key}": value.detach().contiguous()
            for part, module in bare.items()
            for key, value in module.named_parameters()
        }
        save_file(weights, Path(payload["folder"]) / f"{name}-{world.rank}.safetensors")
