"""Where images come to lie in the frame: mirrored, zoomed, shifted, four to one.

In: images with their boxes, and where each shall lie. Out: images and boxes that fit each other.
Must not draw lots, nor know what is asked of the images.

    B images, C channels, H height, W width, N boxes

A `Place` has `scale` (B, 2) and `shift` (B, 2), for rows and columns: what was at y is then at
y * scale + shift. A negative scale mirrors. Places are between pixels: 0 is the upper edge of the
first row, H the lower edge of the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.core.boxes import areas


@dataclass(frozen=True)
class Place:
    """Where each of B images lies. On the CPU."""

    scale: Tensor
    shift: Tensor

    def of(self, rows: Tensor) -> Place:
        """Of some of the images."""
        return Place(self.scale[rows], self.shift[rows])

    def images(self, images: Tensor, *, nearest: bool = False) -> Tensor:
        """float (B, C, H, W) -> the same shape; black where there is no picture. `nearest` makes
        up no new values, as masks need it."""
        count, _, height, width = images.shape
        axes = []
        for axis, pixels in enumerate((height, width)):
            middles = torch.arange(pixels) + 0.5
            source = (middles - self.shift[:, axis, None]) / self.scale[:, axis, None]
            axes.append((source * (2 / pixels) - 1).to(images.device, non_blocking=True))
        rows = axes[0][:, :, None].expand(count, height, width)
        columns = axes[1][:, None, :].expand(count, height, width)
        grid = torch.stack([columns, rows], -1).to(images.dtype)
        mode = "nearest" if nearest else "bilinear"
        return F.grid_sample(images, grid, mode, "zeros", align_corners=False)

    def boxes(self, boxes: Tensor, row: Tensor) -> Tensor:
        """(N, 4) of the images `row` (N,), to where they lie; also outside of the frame."""
        scale = self.scale.to(boxes.device)[row].flip(1)
        shift = self.shift.to(boxes.device)[row].flip(1)
        one = boxes[:, :2] * scale + shift
        other = boxes[:, 2:] * scale + shift
        return torch.cat([torch.minimum(one, other), torch.maximum(one, other)], 1)


def inside(boxes: Tensor, frame: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) cut to their frames (N, 4), and which of them still have a share `least` of their
    area: (N,) bool."""
    low, high = frame[:, :2].repeat(1, 2), frame[:, 2:].repeat(1, 2)
    cut = torch.minimum(torch.maximum(boxes, low), high)
    left = areas(cut)
    return cut, (left > 0) & (left >= least * areas(boxes))
