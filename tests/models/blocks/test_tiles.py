"""Predictions in tiles equal the prediction of the whole image."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.blocks.tiles import in_tiles
from models.core.errors import TesseraError, UsageError


def picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, height, width, generator=generator)


def convolutions(radius: int, scale: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(radius)]
    return nn.Sequential(*layers, nn.Upsample(scale_factor=scale)).eval()


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (31, 100), (33, 16), (20, 9), (1, 70)])
@pytest.mark.parametrize("overlap", [0, 1, 5, 16])
def test_a_pixelwise_network_has_the_same_result_in_tiles(size, overlap):
    image = picture(*size)
    output = in_tiles(image, lambda tiles: tiles * 2, tile=32, overlap=overlap)
    torch.testing.assert_close(output, image * 2)


@pytest.mark.parametrize("size", [(65, 97), (20, 50), (9, 7)])
def test_a_network_that_scales_its_input(size):
    image = picture(*size)
    output = in_tiles(
        image, lambda t: F.interpolate(t, scale_factor=2), tile=24, overlap=7, scale=2
    )
    torch.testing.assert_close(output, F.interpolate(image, scale_factor=2))


@pytest.mark.parametrize("scale", [1, 3])
@torch.no_grad()
def test_a_local_network_has_no_seams(scale):
    """Its receptive field reaches a quarter of the overlap; larger ones show seams."""
    image = picture(90, 75)
    net = convolutions(radius=4, scale=scale)
    whole = net(image)
    output = in_tiles(image, net, tile=40, overlap=16, scale=scale)
    torch.testing.assert_close(output, whole)
    seams = in_tiles(image, net, tile=40, overlap=8, scale=scale)
    assert not torch.allclose(seams, whole, atol=1e-4)
    torch.testing.assert_close(
        seams[..., : 20 * scale, : 20 * scale], whole[..., : 20 * scale, : 20 * scale]
    )


def test_tiles_are_of_the_set_size_and_few_at_once():
    shapes = []

    def run(tiles):
        shapes.append(tuple(tiles.shape))
        return tiles[:, :1]

    assert in_tiles(picture(100, 20), run, tile=32, overlap=8).shape == (1, 1, 100, 20)
    assert shapes == [(4, 3, 32, 20)]
    shapes.clear()
    in_tiles(picture(32, 32), run, tile=32, overlap=8)
    assert shapes == [(1, 3, 32, 32)]


def test_blended_values_are_between_those_of_the_tiles():
    """Tiles have different values; in the overlap the result changes from one to the other."""
    calls = []

    def run(tiles):
        calls.append(len(tiles))
        return torch.arange(len(tiles))[:, None, None, None].expand(-1, 1, *tiles.shape[-2:])

    output = in_tiles(picture(8, 56), run, tile=32, overlap=8)[0, 0, 0]
    assert calls == [2]
    assert output[:26].tolist() == [0] * 26
    assert output[30:].tolist() == [1] * 26
    assert output[26:30].tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875])


@pytest.mark.parametrize(("tile", "overlap"), [(32, 17), (32, -1), (0, 0)])
def test_invalid_tile_settings_are_refused(tile, overlap):
    with pytest.raises(UsageError, match="can't overlap"):
        in_tiles(picture(8, 8), lambda t: t, tile=tile, overlap=overlap)


def test_an_output_of_unexpected_scale_is_an_error():
    with pytest.raises(TesseraError, match=r"\(8, 8\), not \(16, 16\)"):
        in_tiles(picture(8, 8), lambda t: t, tile=32, overlap=8, scale=2)
