"""A network on an image that is too large for it: overlapping tiles, blended.

In: an image, and a function that runs the network on a few tiles. Out: the network's output for the
whole image. Must not know what the network does.

    C channels in, K channels out, H height, W width of the image, S scale of the output

The overlap-tile strategy of Ronneberger et al., U-Net, 2015, with soft seams. Where two tiles
overlap, the outer quarter of each is not used, because there the network saw least of the
surroundings; in the middle half, one tile fades into the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.core.errors import TesseraError, UsageError

AT_ONCE = 4
"""Tiles in one run of the network. Fixed, so that predictions don't depend on the hardware."""


def in_tiles(
    image: Tensor,
    run: Callable[[Tensor], Tensor],
    *,
    tile: int,
    overlap: int,
    scale: int = 1,
) -> Tensor:
    """The output of `run` for an image (1, C, H, W), as (1, K, H*S, W*S) float32.

    `run` takes tiles (B, C, h, w) of one size, h and w at most `tile`, and returns (B, K, h*S,
    w*S). Neighbours share at least `overlap` pixels. If a pixel of the output depends only on
    pixels at most `overlap // 4` away, the result is that of the whole image, except for rounding.
    An image with no side longer than a tile is run in one piece. Raises UsageError for an overlap
    of more than half a tile.
    """
    check_tiles(tile, overlap)
    height, width = image.shape[-2:]
    if max(height, width) <= tile:
        return _checked(run(image), image, scale).float()
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    high, wide = min(tile, height), min(tile, width)
    corners = [(top, left) for top in tops for left in lefts]
    total = weights = torch.empty(0)
    for begin in range(0, len(corners), AT_ONCE):
        some = corners[begin : begin + AT_ONCE]
        tiles = torch.cat([image[..., top : top + high, left : left + wide] for top, left in some])
        outputs = _checked(run(tiles), tiles, scale).float()
        if begin == 0:
            total = outputs.new_zeros(1, outputs.shape[1], height * scale, width * scale)
            weights = outputs.new_zeros(1, 1, height * scale, width * scale)
        for (top, left), output in zip(some, outputs):
            down = _window(top, high, height, overlap, scale)
            right = _window(left, wide, width, overlap, scale)
            weight = (down[:, None] * right).to(outputs.device)
            rows = slice(top * scale, (top + high) * scale)
            columns = slice(left * scale, (left + wide) * scale)
            total[0, :, rows, columns] += output * weight
            weights[0, :, rows, columns] += weight
    return total / weights


def check_tiles(tile: int, overlap: int) -> None:
    """Raises UsageError if tiles of that side can't overlap by so much."""
    if tile < 1 or not 0 <= 2 * overlap <= tile:
        raise UsageError(
            f"tiles of {tile} pixels can't overlap by {overlap}",
            hint="model.overlap is 0 or more, and at most half of model.tile",
        )


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: in equal steps, except that the last one ends with the
    image."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _window(start: int, length: int, size: int, overlap: int, scale: int) -> Tensor:
    """Weights of a tile's pixels along one side, (length * S,): 1, except toward a neighbour, where
    they are 0 in the outer quarter of the overlap and rise in its middle half."""
    unused, rise = (overlap // 4) * scale, (overlap - 2 * (overlap // 4)) * scale
    distance = torch.arange(length * scale, dtype=torch.float32) + 0.5
    window = torch.ones(length * scale)
    for neighbour, ramp in ((start > 0, distance), (start + length < size, distance.flip(0))):
        if neighbour and overlap:
            window = window.minimum(((ramp - unused) / rise).clamp(0, 1))
    return window


def _checked(output: Tensor, tiles: Tensor, scale: int) -> Tensor:
    expected = (tiles.shape[-2] * scale, tiles.shape[-1] * scale)
    if output.shape[-2:] != expected:
        raise TesseraError(
            f"the network's output for a tile of {tuple(tiles.shape[-2:])} pixels has "
            f"{tuple(output.shape[-2:])}, not {expected}"
        )
    return output
