"""GoogLeNet: the auxiliary heads are part of the training loss, and of nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import models
from models.core.family import DataSpec
from models.googlenet import AUXILIARY_WEIGHT, GoogLeNetConfig

GOOGLENET = models.get("googlenet")
SPEC = DataSpec("classification", 3, 16, 16, ("a", "b", "c"))


def network(**settings) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"width_divisor": 8, "dropout": 0.0, "auxiliary_dropout": 0.0, **settings}
    return GOOGLENET.build(GoogLeNetConfig(**settings), SPEC)


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"image": torch.randn(count, *SPEC.shape), "label": torch.arange(count) % 3}


def test_the_loss_follows_the_paper():
    net, inputs = network(), batch()
    outputs = net(inputs["image"])
    main, second, first = (F.cross_entropy(o, inputs["label"]) for o in outputs)
    losses = GOOGLENET.loss(net, inputs)
    torch.testing.assert_close(losses["loss"], main + AUXILIARY_WEIGHT * (first + second))
    torch.testing.assert_close(losses["main_loss"], main)
    right = (outputs.logits.argmax(1) == inputs["label"]).float().mean()
    assert losses["accuracy"] == right


def test_label_smoothing_applies_to_all_heads():
    net, inputs = network(), batch()
    target = torch.full((6, 3), 1 / 3)
    outputs = net(inputs["image"])
    parts = [F.cross_entropy(o, target) for o in outputs]
    expected = parts[0] + AUXILIARY_WEIGHT * (parts[1] + parts[2])
    result = GOOGLENET.loss(net, {**inputs, "target": target})["loss"]
    torch.testing.assert_close(result, expected)


def test_predictions_use_the_main_head_only():
    net, inputs = network().eval(), batch()
    losses = GOOGLENET.loss(net, inputs)
    assert torch.equal(losses["loss"], losses["main_loss"])
    assert not any("aux" in name for name in network(auxiliary=False).state_dict())
    plain = GOOGLENET.loss(network(auxiliary=False).train(), inputs)
    assert torch.equal(plain["loss"], plain["main_loss"])


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_width_divisor_divides_every_layer(divisor):
    import torchvision

    with torch.device("meta"):
        theirs = torchvision.models.googlenet(weights=None, num_classes=3, init_weights=False)
    with torch.no_grad():
        ours = network(width_divisor=divisor)
        assert ours.eval()(batch()["image"]).shape == (6, 3)
    for name, value in theirs.state_dict().items():
        if name.endswith("bn.weight"):
            assert ours.state_dict()[name].shape[0] * divisor == value.shape[0], name
