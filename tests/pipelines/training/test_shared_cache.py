"""The ranks of a machine share a buffer, and no file remains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gloo_ranks
import pytest

from models.core.family import DataSpec
from pipelines.data.loading import pixel_cache
from pipelines.interfaces import World
from pipelines.training.shared_cache import share_pixels

SPEC = DataSpec("classification", 1, 4, 4, ("a", "b"))


def work(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    """Each rank writes its own sample, then waits until it sees those of all ranks."""
    shared = share_pixels(world.size, SPEC, world)
    if shared is None:
        return {"shared": False}
    assert shared.path is not None
    shared.images[world.rank] = world.rank + 1
    shared.filled[world.rank] = 1
    deadline = time.monotonic() + 20
    while int(shared.filled.sum()) < world.size and time.monotonic() < deadline:
        time.sleep(0.01)
    return {
        "shared": True,
        "named": shared.path.exists(),
        "path": str(shared.path),
        "seen": shared.images[:, 0, 0, 0].tolist(),
    }


@pytest.mark.slow
def test_three_ranks_see_each_other_s_samples() -> None:
    predictions = gloo_ranks.run(Path(__file__), "work", 3, {})
    assert [response["seen"] for response in predictions] == [[1, 2, 3]] * 3
    assert len({response["path"] for response in predictions}) == 1
    assert not any(response["named"] for response in predictions), (
        "a killed rank would leave it behind"
    )


def test_a_single_rank_has_no_shared_buffer() -> None:
    assert share_pixels(3, SPEC, World()) is None


def test_a_buffer_has_a_file_until_it_is_unlinked() -> None:
    """Control of the tests above."""
    buffer = pixel_cache.create(3, SPEC)
    assert buffer is not None
    assert buffer.path is not None
    assert buffer.path.exists()
    buffer.unlink()
    assert not buffer.path.exists()
