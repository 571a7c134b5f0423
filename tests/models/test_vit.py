"""ViT: positions, patches and drop path, against torch's own transformer layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from models.core.family import DataSpec
from models.vit import Block, VitConfig, sines

VIT = models.get("vit")


def build(height: int = 16, width: int = 16, channels: int = 3, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = VitConfig(**{"width": 32, "depth": 3, "heads": 2, "drop_path": 0.0, **settings})
    return VIT.build(config, DataSpec("classification", channels, height, width, ("a", "b")))


def test_a_block_agrees_with_torchs_encoder_layer():
    """Pre-norm, with the same weights."""
    torch.manual_seed(0)
    ours = Block(VitConfig(width=32, heads=4, expansion=2), 0.0).eval()
    theirs = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    pairs = {
        "self_attn.in_proj_": "query_key_value.", "self_attn.out_proj.": "project.",
        "linear1.": "dense.0.", "linear2.": "dense.3.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    state = ours.state_dict()
    theirs.load_state_dict(
        {t + kind: state[o + kind] for t, o in pairs.items() for kind in ("weight", "bias")}
    )
    tokens = torch.randn(3, 5, 32)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


@pytest.mark.parametrize(
    ("size", "patch", "side", "count"),
    [
        ((28, 28), 0, 4, 49), ((32, 32), 0, 4, 64), ((8, 8), 0, 1, 64), ((224, 224), 0, 16, 196),
        ((28, 28), 7, 7, 16), ((28, 28), 5, 5, 36), ((20, 33), 8, 8, 15), ((4, 4), 9, 9, 1),
    ],
)  # fmt: skip
def test_any_patch_size_works(size, patch, side, count):
    net = build(*size, patch=patch)
    assert net.patches.kernel_size == (side, side)
    assert net.positions.shape == (count, 32)
    assert net.eval()(torch.randn(2, 3, *size)).shape == (2, 2)


def test_every_pixel_has_an_influence():
    """Also pixels of patches that are partly outside of the image."""
    net = build(13, 18, patch=4).eval()
    image = torch.randn(1, 3, 13, 18, requires_grad=True)
    net(image)[0, 0].backward()
    assert image.grad.abs().sum(1).min() > 0


def test_positions_differ_and_order_matters():
    places = sines(7, 9, 32)
    assert torch.cdist(places, places).fill_diagonal_(1).min() > 0.1
    assert torch.equal(places.view(7, 9, 32)[:5, :6], sines(5, 6, 32).view(5, 6, 32))
    net = build(patch=8).eval()
    image = torch.randn(1, 3, 16, 16)
    turned = image.roll(8, 2)
    assert (net(image) - net(turned)).abs().max() > 1e-4
    net.positions.zero_()  # the control: without positions the order of patches is lost
    torch.testing.assert_close(net(image), net(turned))


def test_positions_are_not_trained():
    assert "positions" not in build().state_dict()


def test_drop_path_is_active_in_training_only():
    net, image = build(drop_path=0.9), torch.randn(64, 3, 16, 16)
    assert [block.drop_path.p for block in net.blocks] == [0.0, 0.45, 0.9]
    torch.manual_seed(0)
    first = net.train()(image)
    assert not torch.equal(first, net(image))
    torch.manual_seed(0)
    assert torch.equal(first, net(image))
    net.eval()
    assert torch.equal(net(image), net(image))
