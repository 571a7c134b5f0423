"""Functions of a `World`: with one rank nothing is sent, with two all ranks agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gloo_ranks
import pytest
import torch
from torch import nn

from pipelines.interfaces import World
from pipelines.training import distributed


def test_a_world_of_one_returns_its_arguments() -> None:
    world, values, module = World(), torch.tensor([1.0]), nn.Linear(1, 1)
    assert distributed.all_sum(values, world) is values
    assert distributed.gather(3, world) == distributed.all_gather(3, world) == [3]
    assert distributed.broadcast("x", world) == "x"
    assert distributed.wrap(module, world) is module
    with distributed.no_sync([module]):
        pass


def agree(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank."""
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(float(world.rank))
    norm.num_batches_tracked.fill_(world.rank)
    distributed.average_buffers(norm, world)
    return {
        "sum": distributed.all_sum(torch.tensor([1.0 + world.rank]), world).tolist(),
        "gathered": distributed.gather(world.rank, world),
        "everywhere": distributed.all_gather(world.rank, world),
        "first": distributed.broadcast(world.rank, world),
        "mean": norm.running_mean.tolist(),
        "batches": int(norm.num_batches_tracked),
    }


@pytest.mark.slow
def test_two_ranks_agree() -> None:
    first, second = gloo_ranks.run(Path(__file__), "agree", 2, {})
    assert first["sum"] == second["sum"] == [3.0]
    assert first["gathered"] == [0, 1]
    assert second["gathered"] is None
    assert first["everywhere"] == second["everywhere"] == [0, 1]
    assert first["first"] == second["first"] == 0
    assert first["mean"] == second["mean"] == [0.5]
    assert (first["batches"], second["batches"]) == (0, 1)  # integers stay each rank's own
