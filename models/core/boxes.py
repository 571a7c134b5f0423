"""Boxes and their intersection over union.

In: boxes. Out: numbers. Must not know images or networks.

    N, M boxes; a box is (left, top, right, bottom) in pixels
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TINY = 1e-7


def areas(boxes: Tensor) -> Tensor:
    """(…, 4) -> (…): the area; 0 for a box with right < left or bottom < top."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(…, N, 4), (…, M, 4) -> (…, N, M): intersection over union; 0 if both have no area."""
    return iou(boxes[..., :, None, :], others[..., None, :, :])


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(…, 4), (…, 4) -> (…): intersection over union of pairs; shapes broadcast."""
    intersection, union = _intersection_and_union(boxes, others)
    return intersection / union.clamp(min=_TINY)


def share_inside(boxes: Tensor, others: Tensor) -> Tensor:
    """(N, 4), (M, 4) -> (N, M): the share of each box that lies in each of the others."""
    intersection, _ = _intersection_and_union(boxes[:, None], others)
    return intersection / areas(boxes)[:, None].clamp(min=_TINY)


def complete_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(…, 4), (…, 4) -> (…): CIoU of pairs, in (-2, 1]: the IoU minus the squared distance of the
    centres, relative to the diagonal of the box around both, minus a penalty for different aspect
    ratios (Zheng et al., Distance-IoU Loss, 2020: https://arxiv.org/abs/1911.08287)."""
    intersection, union = _intersection_and_union(boxes, others)
    value = intersection / union.clamp(min=_TINY)
    around = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(
        boxes[..., :2], others[..., :2]
    )
    between = (boxes[..., :2] + boxes[..., 2:] - others[..., :2] - others[..., 2:]) / 2
    distance = between.square().sum(-1) / around.square().sum(-1).clamp(min=_TINY)
    shape = (4 / math.pi**2) * (_angle(boxes) - _angle(others)).square()
    with torch.no_grad():  # as in the paper, no gradient flows through the weight
        weight = shape / (1 - value + shape).clamp(min=_TINY)
    return value - distance - weight * shape


def _intersection_and_union(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    corner = torch.maximum(boxes[..., :2], others[..., :2])
    opposite = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = areas(torch.cat([corner, opposite], -1))
    return intersection, areas(boxes) + areas(others) - intersection


def _angle(boxes: Tensor) -> Tensor:
    wide, high = (boxes[..., 2:] - boxes[..., :2]).clamp(min=_TINY).unbind(-1)
    return torch.atan(wide / high)
