"""RNN: the order of steps, both directions, and an exported network equal to the trained one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from models.core.family import DataSpec
from models.rnn import RnnConfig, sequence

RNN = models.get("rnn")


def spec(height: int = 12, width: int = 10, channels: int = 2) -> DataSpec:
    means, stds = (0.4,) * channels, (0.3,) * channels
    return DataSpec("classification", channels, height, width, ("a", "b", "c"), means, stds)


def build(data: DataSpec | None = None, **settings) -> nn.Module:
    torch.manual_seed(0)
    return RNN.build(RnnConfig(**{"hidden": 16, **settings}), data or spec())


def test_rows_are_steps():
    image = torch.randn(3, 2, 12, 10)
    steps = sequence(image, 1, 10)
    assert steps.shape == (3, 12, 20)
    for row in range(12):
        assert torch.equal(steps[:, row], image[:, :, row].flatten(1))


def test_patches_are_steps_in_row_order():
    image = torch.randn(3, 2, 12, 10)
    steps = sequence(image, 4, 4)
    assert steps.shape == (3, 9, 32)
    assert torch.equal(steps[:, 1], image[:, :, 0:4, 4:8].flatten(1))
    assert torch.equal(steps[:, 3], image[:, :, 4:8, 0:4].flatten(1))
    edge = steps[:, 2].view(3, 2, 4, 4)
    assert torch.equal(edge[..., :2], image[:, :, 0:4, 8:10])
    assert not edge[..., 2:].any()


def test_read_last_uses_the_last_step_of_each_direction():
    net = build(read="last", bidirectional=True, layers=1).eval()
    image = torch.randn(2, 2, 12, 10)
    _, (states, _) = net.recurrent(sequence(image, 1, 10))
    expected = net.head(torch.cat([states[0], states[1]], 1))
    torch.testing.assert_close(net(image), expected)


def test_forget_gates_begin_open():
    net = build(layers=2, bidirectional=True)
    for layer in ("l0", "l0_reverse", "l1", "l1_reverse"):
        bias = getattr(net.recurrent, f"bias_ih_{layer}").view(4, 16)
        assert (bias[1] == 1).all()
        assert (bias[[0, 2, 3]] != 1).all()


KINDS = [
    {"cell": cell, "read": read, "bidirectional": both, "layers": layers, "patch": patch}
    for cell in ("lstm", "gru")
    for read, both, layers, patch in (
        ("mean", False, 1, 0), ("last", True, 2, 0), ("mean", True, 2, 4), ("last", False, 2, 4)
    )
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_exported_and_half_precision_outputs_agree(kind):
    net = build(**kind).train()
    images = torch.randint(0, 256, (4, 12, 10, 2), dtype=torch.uint8)
    output_name = RNN.exportable(net, spec())
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
    with torch.no_grad():
        expected = net.eval()(pixels).softmax(1)
        torch.testing.assert_close(output_name(images), expected)
        shapes = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(output_name, (images[:2],), dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(images), expected)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(pixels).float().softmax(1)
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_trains_in_half_precision(kind):
    net = build(**kind, dropout=0.2).train()
    batch = {"image": torch.randn(4, 2, 12, 10), "label": torch.tensor([0, 1, 2, 0])}
    with torch.autocast("cpu", torch.bfloat16):
        losses = RNN.loss(net, batch)
    losses["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_control_torchs_own_layer_is_not_exported_cleanly():
    """Control: therefore the exported network has another layer."""
    net = build(layers=1).eval()
    with pytest.warns(UserWarning, match="assigned during export"):
        torch.export.export(net, (torch.randn(2, 2, 12, 10),))
