"""The parts that all classification families share."""

from __future__ import annotations

import pickle

import torch
from torch import nn
from torch.nn import functional as F

import models
from models.core.family import BatchRng, DataSpec

CNN = models.get("cnn")
SPEC = DataSpec("classification", 1, 8, 8, ("a", "b", "c"), (0.3,), (0.2,))


def batch(count: int = 32) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(count, 1, 8, 8, generator=generator),
        "label": torch.arange(count) % 3,
        "key": [str(i) for i in range(count)],
    }


def network() -> nn.Module:
    torch.manual_seed(0)
    return CNN.build(CNN.variants["tiny"], SPEC).eval()


def test_smoothed_targets_agree_with_label_smoothing():
    settings = CNN.task.augment_settings(label_smoothing=0.1)
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
    transform = CNN.augment(settings, SPEC, train=True)
    seen = transform({**batch(), "image": images}, BatchRng(0, 32, slice(0, 32)))
    module = network()
    expected = F.cross_entropy(module(seen["image"]), seen["label"], label_smoothing=0.1)
    losses = CNN.loss(module, seen)
    torch.testing.assert_close(losses["loss"], expected)
    del seen["target"]
    plain = F.cross_entropy(module(seen["image"]), seen["label"])
    torch.testing.assert_close(CNN.loss(module, seen)["loss"], plain)
    output = module(seen["image"]).argmax(1)
    assert losses["accuracy"] == (output == seen["label"]).float().mean()


def test_a_pickled_prediction_has_only_its_own_row():
    predictions = CNN.predict(network(), batch(512))
    assert len(pickle.dumps(predictions[0])) < 2000
    assert all(p["probabilities"].dtype == torch.float32 for p in predictions)
    assert all(p["label"] == int(p["probabilities"].argmax()) for p in predictions)
    assert not predictions[0]["probabilities"].requires_grad


def test_the_exported_network_is_a_copy():
    module = network().train()
    output_name = CNN.exportable(module, SPEC)
    before = output_name(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert torch.equal(output_name(torch.zeros(1, 8, 8, 1, dtype=torch.uint8)), before)
    assert module.training
