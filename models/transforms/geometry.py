"""Geometry of augmentations: mirroring, zooming and shifting images with their boxes.

In: images with their boxes, and where each is placed. Out: transformed images and boxes. Must not
draw random numbers, nor know the task.

    B images, C channels, H height, W width, N boxes

A `Placement` has `scale` (B, 2) and `shift` (B, 2), for rows and columns: what was at y is then at
y * scale + shift. A negative scale mirrors. Coordinates are between pixels: 0 is the upper edge of
the first row, H the lower edge of the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.core.boxes import areas


@dataclass(frozen=True)
class Placement:
    """Where each of B images is placed in the output. On the CPU."""

    scale: Tensor
    shift: Tensor

    def of(self, rows: Tensor) -> Placement:
        """The placements of some of the images."""
        return Placement(self.scale[rows], self.shift[rows])

    def images(self, images: Tensor, *, nearest: bool = False) -> Tensor:
        """float (B, C, H, W) -> the same shape, black outside the images. `nearest` doesn't
        interpolate: masks must not get new values."""
        count, _, height, width = images.shape
        axes = []
        for axis, pixels in enumerate((height, width)):
            centres = torch.arange(pixels) + 0.5
            source = (centres - self.shift[:, axis, None]) / self.scale[:, axis, None]
            axes.append((source * (2 / pixels) - 1).to(images.device, non_blocking=True))
        rows = axes[0][:, :, None].expand(count, height, width)
        columns = axes[1][:, None, :].expand(count, height, width)
        grid = torch.stack([columns, rows], -1).to(images.dtype)
        mode = "nearest" if nearest else "bilinear"
        return F.grid_sample(images, grid, mode, "zeros", align_corners=False)

    def boxes(self, boxes: Tensor, row: Tensor) -> Tensor:
        """Boxes (N, 4) of the images `row` (N,), transformed; they can lie outside of the
        output."""
        scale = self.scale.to(boxes.device)[row].flip(1)
        shift = self.shift.to(boxes.device)[row].flip(1)
        first = boxes[:, :2] * scale + shift
        second = boxes[:, 2:] * scale + shift
        return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], 1)


def inside(boxes: Tensor, frame: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) clipped to their frames (N, 4), and (N,) bool: which of them keep at least the
    share `least` of their area."""
    low, high = frame[:, :2].repeat(1, 2), frame[:, 2:].repeat(1, 2)
    cut = torch.minimum(torch.maximum(boxes, low), high)
    left = areas(cut)
    return cut, (left > 0) & (left >= least * areas(boxes))
