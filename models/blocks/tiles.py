"""A network over an image that is too large for it at once: overlapping tiles, blended.

In: an image, and what runs the network on a few tiles. Out: what it would have made of the whole.
Must not know what the network does.

    C channels in, K channels out, H height, W width of the image, S scale of the output

The overlap-tile strategy of Ronneberger et al., U-Net, 2015, with soft seams: where two tiles
overlap, the outer quarter of the overlap is not used of either, because the network saw least
around it, and in the middle half one fades into the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.core.errors import TesseraError, UsageError

AT_ONCE = 4
"""Tiles in one run of the network. Fixed: answers must not depend on the hardware."""


def in_tiles(
    image: Tensor,
    run: Callable[[Tensor], Tensor],
    *,
    tile: int,
    overlap: int,
    scale: int = 1,
) -> Tensor:
    """What `run` makes of image (1, C, H, W), as (1, K, H*S, W*S) float32.

    `run` takes tiles (B, C, h, w) of one size, h and w at most `tile`, and gives
    (B, K, h*S, w*S). Neighbours share at least `overlap` pixels. Where a pixel of the output
    depends on no more than `overlap // 4` pixels around it, the result is that of the whole image,
    but for rounding. An image with no side longer than a tile is run as it is. Raises UsageError
    for an overlap of more than half a tile.
    """
    check_tiles(tile, overlap)
    height, width = image.shape[-2:]
    if max(height, width) <= tile:
        return _checked(run(image), image, scale).float()
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    high, wide = min(tile, height), min(tile, width)
    places = [(top, left) for top in tops for left in lefts]
    total = weights = torch.empty(0)
    for begin in range(0, len(places), AT_ONCE):
        some = places[begin : begin + AT_ONCE]
        tiles = torch.cat([image[..., top : top + high, left : left + wide] for top, left in some])
        made = _checked(run(tiles), tiles, scale).float()
        if begin == 0:
            total = made.new_zeros(1, made.shape[1], height * scale, width * scale)
            weights = made.new_zeros(1, 1, height * scale, width * scale)
        for (top, left), one in zip(some, made):
            down = _window(top, high, height, overlap, scale)
            right = _window(left, wide, width, overlap, scale)
            weight = (down[:, None] * right).to(made.device)
            rows = slice(top * scale, (top + high) * scale)
            columns = slice(left * scale, (left + wide) * scale)
            total[0, :, rows, columns] += one * weight
            weights[0, :, rows, columns] += weight
    return total / weights


def check_tiles(tile: int, overlap: int) -> None:
    """Raises UsageError where tiles of that side can't overlap so much."""
    if tile < 1 or not 0 <= 2 * overlap <= tile:
        raise UsageError(
            f"tiles of {tile} pixels can't overlap by {overlap}",
            hint="model.overlap is 0 or more, and at most half of model.tile",
        )


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: in equal steps, but the last ends with the image."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _window(start: int, length: int, size: int, overlap: int, scale: int) -> Tensor:
    """The weights of a tile's pixels along one side, (length * S,): 1, but toward a neighbour 0 in
    the outer quarter of the overlap and rising in the middle half."""
    unused, rise = (overlap // 4) * scale, (overlap - 2 * (overlap // 4)) * scale
    distance = torch.arange(length * scale, dtype=torch.float32) + 0.5
    window = torch.ones(length * scale)
    for neighbour, ramp in ((start > 0, distance), (start + length < size, distance.flip(0))):
        if neighbour and overlap:
            window = window.minimum(((ramp - unused) / rise).clamp(0, 1))
    return window


def _checked(made: Tensor, given: Tensor, scale: int) -> Tensor:
    expected = (given.shape[-2] * scale, given.shape[-1] * scale)
    if made.shape[-2:] != expected:
        raise TesseraError(
            f"a network made {tuple(made.shape[-2:])} of a tile of {tuple(given.shape[-2:])}, "
            f"{expected} was expected"
        )
    return made
