"""Estimates of time and memory before a training, beside what trainings of several sizes need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines import recipe as recipes
from pipelines.training.estimate import Estimate, estimate
from pipelines.training.setup import open_setup


def of(digits: Path, **changes: Any) -> Estimate:
    settings = {"data.path": str(digits), "workers.count": 0, **changes}
    return estimate(open_setup(recipes.start("cnn", "tiny").with_overrides(settings)))


def test_weights_gradients_and_moments_are_counted(digits: Path) -> None:
    """A batch of one image has few activations beside a wide layer."""
    setup = open_setup(
        recipes.start("vit", "tiny").with_overrides(
            {"data.path": str(digits), "model.width": 512, "train.batch_size": 1}
        )
    )
    weights = sum(t.nbytes for t in setup.build_module().state_dict().values())
    assert 4 * weights < estimate(setup).memory_bytes < 4.5 * weights  # AdamW has two moments


def test_activations_grow_with_the_batch_of_a_worker(digits: Path) -> None:
    few, many = (of(digits, **{"train.batch_size": size}).memory_bytes for size in (64, 512))
    assert 6 < many / few < 8.5
    changes = {"train.batch_size": 512, "workers.count": 8}
    assert of(digits, **changes).memory_bytes == pytest.approx(few, rel=0.1)
    changes = {"train.batch_size": 512, "train.accumulate": 8}
    assert of(digits, **changes).memory_bytes == pytest.approx(few, rel=0.1)


def test_the_time_is_that_of_all_steps(digits: Path) -> None:
    one = of(digits, **{"train.epochs": 1, "train.batch_size": 100})
    samples = (
        open_setup(recipes.start("cnn").with_overrides({"data.path": str(digits)}))
        .card.splits["train"]
        .samples
    )
    assert one.step_seconds > 0
    assert one.seconds > -(-samples // 100) * one.step_seconds
    assert one.seconds < 2 * -(-samples // 100) * one.step_seconds


def test_nothing_stays_behind(digits: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    of(digits, **{"workers.count": 2})
    assert torch.get_num_threads() == threads
