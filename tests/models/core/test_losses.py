"""Losses of classes, beside those of torchvision and torch, and weights worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import models
from models.core.family import DataSpec
from models.core.losses import KINDS, LossKind, LossSettings, class_losses, weights_of

SPEC = DataSpec("classification", 3, 32, 32, ("a", "b", "c"), counts=(90, 9, 1))
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0], [1.0, 1.0, 1.0], [-4.0, 0.0, 4.0]])
LABELS = torch.tensor([0, 2, 1, 2])


def test_weights_balance_the_classes() -> None:
    shares = torch.tensor([0.9, 0.09, 0.01])
    assert weights_of(SPEC.counts, "none").tolist() == [1, 1, 1]
    balanced = weights_of(SPEC.counts, "balanced")
    torch.testing.assert_close(balanced * shares, torch.full((3,), 1 / 3))
    root = weights_of(SPEC.counts, "sqrt")
    torch.testing.assert_close(root[2] / root[0], torch.tensor(math.sqrt(90)))
    assert float((root * shares).sum()) == pytest.approx(1)
    absent = weights_of((90, 10, 0), "balanced")
    torch.testing.assert_close(absent, torch.tensor([0.5 / 0.9, 5.0, 1.0]))
    assert LossSettings.of("bce", "balanced", ()) == LossSettings("bce")
    assert LossSettings.of("bce", "balanced", (2, 2)).weights == (1, 1)


def test_the_effective_number_lies_between_none_and_balanced() -> None:
    """By the formula of the paper: (1 - beta) / (1 - beta^n)."""
    counts = (50_000, 5000, 50)
    weights = weights_of(counts, "effective_number")
    raw = [(1 - 0.9999) / (1 - 0.9999**n) for n in counts]
    torch.testing.assert_close(weights / weights[0], torch.tensor(raw) / raw[0], rtol=1e-3, atol=0)
    balanced = weights_of(counts, "balanced")
    assert 1 < weights[2] / weights[0] < balanced[2] / balanced[0]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_their_probabilities_give_the_same(kind: LossKind) -> None:
    settings = LossSettings(kind, (0.5, 2.0, 4.0))
    soft = F.one_hot(LABELS, 3).float()
    torch.testing.assert_close(
        class_losses(LOGITS, LABELS, settings), class_losses(LOGITS, soft, settings)
    )
    plain = class_losses(LOGITS, LABELS, LossSettings(kind))
    weights = torch.tensor(settings.weights)
    torch.testing.assert_close(class_losses(LOGITS, LABELS, settings), plain * weights[LABELS])


def test_the_losses_are_those_of_torch() -> None:
    soft = F.one_hot(LABELS, 3).float()
    cases: dict[LossKind, torch.Tensor] = {
        "cross_entropy": F.cross_entropy(LOGITS, LABELS, reduction="none"),
        "bce": F.binary_cross_entropy_with_logits(LOGITS, soft, reduction="none").mean(1),
    }
    for kind, expected in cases.items():
        torch.testing.assert_close(class_losses(LOGITS, LABELS, LossSettings(kind)), expected)


def test_the_focal_loss_of_two_classes_is_torchvisions() -> None:
    """A softmax of (x, 0) is a sigmoid of x."""
    from torchvision.ops import sigmoid_focal_loss

    x = torch.tensor([-3.0, -0.5, 0.0, 0.7, 4.0])
    logits = torch.stack([x, torch.zeros(5)], 1)
    for label, target in ((0, 1.0), (1, 0.0)):
        expected = sigmoid_focal_loss(x, torch.full((5,), target), alpha=-1, gamma=2)
        got = class_losses(logits, torch.full((5,), label), LossSettings("focal"))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", [n for n in models.names() if models.get(n).losses == KINDS])
def test_every_classifier_follows_the_settings(name: str) -> None:
    family: Any = models.get(name)
    torch.manual_seed(0)
    data = replace(SPEC, mean=(0.5,) * 3, std=(0.2,) * 3)
    module = family.build(family.variants["tiny"], data).eval()
    batch = {"image": torch.randn(4, 3, 32, 32), "label": LABELS}
    plain = family.loss(module, batch)["loss"]
    tripled = family.with_loss(LossSettings("cross_entropy", (3.0,) * 3)).loss(module, batch)
    torch.testing.assert_close(tripled["loss"], 3 * plain)
    assert family.loss_settings is None
