"""Predictions of a split: gathered in its order, and the worst of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import models
from models.core.family import DataSpec
from pipelines.training import evaluator
from pipelines.training.evaluator import Predictions

DATA = DataSpec("classification", 1, 4, 4, ("a", "b"))
CNN = models.get("cnn")


def test_tensors_and_lists_of_tensors_are_moved() -> None:
    batch = {"image": torch.zeros(2), "boxes": [torch.zeros(1), torch.zeros(3)], "key": ["a", "b"]}
    moved = evaluator.to_device(batch, "meta")
    assert moved["image"].is_meta
    assert all(boxes.is_meta for boxes in moved["boxes"])
    assert moved["key"] == ["a", "b"]


def records(*probabilities: float) -> Predictions:
    """Of images of the class 0."""
    rows = [
        {"label": 0, "predicted": int(p < 0.5), "probabilities": torch.tensor([p, 1 - p])}
        for p in probabilities
    ]
    keys = [str(n) for n in range(len(rows))]
    return Predictions(rows, keys, list(range(len(rows))))


def test_the_most_wrong_come_first_and_equal_ones_in_order() -> None:
    predictions = records(0.9, 0.1, 0.6, 0.1)
    assert predictions.worst(CNN, 3) == [1, 3, 2]
    assert predictions.metrics(CNN, DATA)["accuracy"] == 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mixed_precision_is_on_for_bf16_alone(precision: str) -> None:
    with evaluator.autocast("cpu", precision):
        product: Tensor = torch.ones(2, 2) @ torch.ones(2, 2)
    assert (product.dtype == torch.bfloat16) is (precision == "bf16")
