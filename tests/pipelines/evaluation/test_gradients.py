"""Gradients of images leave the network as it was."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.evaluation import gradients


def make() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.Linear(2, 1, bias=False))
    net[1].eval()
    net[2].weight.requires_grad_(False)
    return net


def state(net: nn.Module) -> tuple[list[bool], list[bool], list[bool]]:
    return (
        [part.training for part in net.modules()],
        [parameter.requires_grad for parameter in net.parameters()],
        [parameter.grad is None for parameter in net.parameters()],
    )


def test_the_gradient_is_that_of_the_sum() -> None:
    images = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]])
    found = gradients.input_gradient(lambda x: (x**2).sum((1, 2, 3)), images)
    assert torch.equal(found, 2 * images)
    assert not images.requires_grad


def test_modes_and_parameters_are_as_before() -> None:
    net = make()
    before = state(net)
    with gradients.frozen(net):
        assert not any(part.training for part in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())
        found = gradients.input_gradient(net, torch.ones(4, 3))
    assert found.shape == (4, 3)
    assert state(net) == before
    gradients.input_gradient(net, torch.ones(4, 3))
    assert state(net) == before


def test_there_are_gradients_where_none_are_wanted_otherwise() -> None:
    with torch.no_grad():
        assert gradients.input_gradient(make(), torch.ones(1, 3)).abs().sum() > 0
