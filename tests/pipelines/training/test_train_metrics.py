"""Means over a window of steps, and the error for a loss that is not finite."""

from __future__ import annotations

import pytest
import torch

from pipelines.interfaces import World
from pipelines.training.train_metrics import SHOWN_KEYS, NotFiniteError, TrainMetrics


def test_means_are_weighted_by_images() -> None:
    metrics = TrainMetrics()
    metrics.add({"loss": torch.tensor(1.0)}, prefix="", rows=3)
    metrics.add({"loss": torch.tensor(5.0)}, prefix="", rows=1)
    metrics.add({"loss": torch.tensor(2.0)}, prefix="critic_", rows=4)
    metrics.images = metrics.counted = 4
    means = metrics.reduce(World(), step=2)
    assert means.losses == {"loss": 2.0, "critic_loss": 2.0}
    assert means.images_per_second > 0
    assert means.data_wait_share == 0


def test_the_first_step_with_a_loss_that_is_not_finite_is_named() -> None:
    metrics = TrainMetrics()
    for step, loss in enumerate((1.0, float("inf"), float("nan"))):
        keys = [f"{step}-{n}.jpg" for n in range(SHOWN_KEYS + 2)]
        metrics.remember(torch.tensor(loss), step=step, keys=keys)
        metrics.add({"loss": torch.tensor(loss)}, prefix="", rows=1)
    metrics.images = metrics.counted = 3
    with pytest.raises(
        NotFiniteError, match=r"at step 2, in a batch with: 1-0\.jpg, .* and 2 more"
    ):
        metrics.reduce(World(), step=3)
