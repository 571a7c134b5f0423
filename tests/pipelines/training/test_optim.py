"""The learning rate is a function of the samples seen; norms and biases don't decay."""

from __future__ import annotations

import pytest
from torch import nn

from pipelines.recipe import Optim, Schedule
from pipelines.training import optim


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(kind="constant"), {0: 1.0, 50: 1.0, 100: 1.0}),
        (Schedule(kind="cosine"), {0: 1.0, 50: 0.5, 100: 0.0}),
        (Schedule(kind="cosine", warmup=0.2, final=0.1), {10: 0.5, 20: 1.0, 100: 0.1}),
        (Schedule(kind="step", gamma=0.1), {49: 1.0, 50: 0.1, 75: 0.01}),
        (Schedule(kind="one_cycle", warmup=0.5), {0: 0.04, 50: 1.0, 100: 0.0}),
    ],
)
def test_the_learning_rate_follows_the_schedule(
    schedule: Schedule, expected: dict[int, float]
) -> None:
    for seen, value in expected.items():
        assert optim.factor(schedule, seen, 100) == pytest.approx(value, abs=1e-9)


def test_vectors_do_not_decay() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = optim.build(module, Optim(weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {p.ndim: decay[id(p)] for p in module.parameters()} == {4: 0.1, 1: 0.0}
