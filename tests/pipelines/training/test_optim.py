"""The learning rate is a function of the samples seen; norms and biases don't decay; an update is
PyTorch's own to the last bit, but doesn't load its compiler."""

from __future__ import annotations

import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from pipelines.recipe_sections import Optim, Schedule
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


KINDS = [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        network(torch.arange(12.0).reshape(4, 3) + step).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(("kind", "theirs"), KINDS)
def test_updates_and_states_are_those_of_pytorch(
    kind: str, theirs: type[torch.optim.Optimizer]
) -> None:
    ours = nn.Linear(3, 2)
    reference = deepcopy(ours)
    settings = Optim(kind=kind, lr=0.01, weight_decay=0.1)
    optimizer = optim.build(ours, settings)
    assert isinstance(optimizer, theirs)
    groups = [{**group, "params": []} for group in optimizer.param_groups]
    groups[0]["params"], groups[1]["params"] = [reference.weight], [reference.bias]
    plain = theirs(groups, lr=0.01)
    train(ours, optimizer, 3)
    train(reference, plain, 3)
    resumed = optim.build(ours, settings)
    resumed.load_state_dict(optimizer.state_dict())
    train(ours, resumed, 3)
    train(reference, plain, 3)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad
    torch.testing.assert_close(resumed.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "theirs"), KINDS)
def test_a_training_does_not_load_the_compiler(
    kind: str, theirs: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    network = nn.Linear(3, 2)
    optimizer = optim.build(network, Optim(kind=kind))
    train(network, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ImportError, match="_dynamo"):  # the control: PyTorch's own needs it
        train(network, theirs(network.parameters()), 1)
