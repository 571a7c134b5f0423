"""Boxes: how they overlap.

In: boxes. Out: numbers. Must not know images or networks.

    N, M boxes, a box is (left, top, right, bottom) in pixels
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TINY = 1e-7


def areas(boxes: Tensor) -> Tensor:
    """(…, 4) -> (…): the area; 0 for a box whose sides are crossed."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """(…, N, 4), (…, M, 4) -> (…, N, M): intersection over union, 0 where both have no area."""
    return overlap(boxes[..., :, None, :], others[..., None, :, :])


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """(…, 4), (…, 4) -> (…): intersection over union of pairs, shapes broadcast."""
    shared, united = _shared_and_united(boxes, others)
    return shared / united.clamp(min=_TINY)


def covered(boxes: Tensor, others: Tensor) -> Tensor:
    """(N, 4), (M, 4) -> (N, M): how much of each box lies in each of the others."""
    shared, _ = _shared_and_united(boxes[:, None], others)
    return shared / areas(boxes)[:, None].clamp(min=_TINY)


def complete_overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """(…, 4), (…, 4) -> (…): CIoU of pairs, in (-2, 1]. From the overlap are taken the distance of
    the middles, in diagonals of the box around both, and how much the shapes differ
    (Zheng et al., Distance-IoU Loss, 2020: https://arxiv.org/abs/1911.08287)."""
    shared, united = _shared_and_united(boxes, others)
    value = shared / united.clamp(min=_TINY)
    around = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(
        boxes[..., :2], others[..., :2]
    )
    between = (boxes[..., :2] + boxes[..., 2:] - others[..., :2] - others[..., 2:]) / 2
    distance = between.square().sum(-1) / around.square().sum(-1).clamp(min=_TINY)
    shape = (4 / math.pi**2) * (_angle(boxes) - _angle(others)).square()
    with torch.no_grad():  # the article's weight is no part of the gradient
        weight = shape / (1 - value + shape).clamp(min=_TINY)
    return value - distance - weight * shape


def _shared_and_united(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    corner = torch.maximum(boxes[..., :2], others[..., :2])
    opposite = torch.minimum(boxes[..., 2:], others[..., 2:])
    shared = areas(torch.cat([corner, opposite], -1))
    return shared, areas(boxes) + areas(others) - shared


def _angle(boxes: Tensor) -> Tensor:
    wide, high = (boxes[..., 2:] - boxes[..., :2]).clamp(min=_TINY).unbind(-1)
    return torch.atan(wide / high)
