"""Boxes predicted at the points of a grid, without anchors: assignment of objects, and the losses.

In: a network's outputs at every point, and the true boxes. Out: losses, or boxes with scores. Must
not know how the network is built, nor files or tasks.

    B images, A points of all scales, K classes, M true objects of an image, P points with an object
    D bins of a distance

A point has a position in pixels and the stride of its scale. There the network outputs logits:
`objects` (B, A), `classes` (B, A, K), and `distances` (B, A, 4, D), from the point to the left,
top, right and bottom side, in strides.

The score of a class is P(object) · P(class | object), and the target of P(object) is the IoU of the
box with its object: "Pr(Class_i | Object) * Pr(Object) * IOU" in Redmon et al., You Only Look Once,
2016 (https://arxiv.org/abs/1506.02640, equation 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from models.core.boxes import complete_iou, iou, share_inside
from models.core.family import Losses

SCORE_POWER, IOU_POWER = 0.5, 6.0
"""Exponents of the alignment (Feng et al., TOOD, 2021): alpha of the score, beta of the IoU."""


class Grid(NamedTuple):
    """`points` (A, 2): x and y in pixels; `strides` (A,), in pixels."""

    points: Tensor
    strides: Tensor


class Outputs(NamedTuple):
    """A network's outputs at the points: the logits described above."""

    objects: Tensor
    classes: Tensor
    distances: Tensor


class Truths(NamedTuple):
    """The true objects, padded to the largest number in an image: `boxes` (B, M, 4), `labels` (B,
    M), `valid` (B, M) bool, False for padding; and `crowds`, for each image boxes (·, 4)."""

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    crowds: list[Tensor]


@dataclass(frozen=True)
class Weights:
    """Weights of the losses."""

    objects: float = 1.0
    classes: float = 0.5
    boxes: float = 2.0
    distances: float = 0.5


def grid(shapes: Sequence[tuple[int, int]], strides: Sequence[int], like: Tensor) -> Grid:
    """The centres of the cells of feature maps with these shapes (height, width), scale by
    scale."""
    points, lengths = [], []
    for (height, width), stride in zip(shapes, strides):
        rows = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) * stride
        columns = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) * stride
        centres = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).reshape(-1, 2)
        points.append(centres)
        lengths.append(torch.full_like(centres[:, 0], stride))
    return Grid(torch.cat(points), torch.cat(lengths))


def boxes_of(distances: Tensor, grid: Grid) -> Tensor:
    """(B, A, 4, D) logits -> (B, A, 4) in pixels. A distance is the expected value over its
    bins."""
    bins = torch.arange(distances.shape[-1], device=distances.device, dtype=torch.float32)
    lengths = (distances.softmax(-1) @ bins) * grid.strides[:, None]
    return torch.cat([grid.points - lengths[..., :2], grid.points + lengths[..., 2:]], -1)


def scores_of(outputs: Outputs) -> Tensor:
    """(B, A, K): P(object) · P(class | object)."""
    return outputs.objects.sigmoid()[..., None] * outputs.classes.softmax(-1)


def truths(boxes: list[Tensor], labels: list[Tensor], crowd: list[Tensor]) -> Truths:
    """Pads the objects of each image; crowds are kept apart, because they aren't single objects."""
    single = [~one for one in crowd]
    counts = torch.stack([one.sum() for one in single])
    padded = pad_sequence([b[one] for b, one in zip(boxes, single)], batch_first=True)
    names = pad_sequence([k[one] for k, one in zip(labels, single)], batch_first=True)
    valid = torch.arange(padded.shape[1], device=padded.device) < counts[:, None]
    return Truths(padded.float(), names, valid, [b[c].float() for b, c in zip(boxes, crowd)])


@torch.no_grad()
def assign(scores: Tensor, boxes: Tensor, grid: Grid, truth: Truths, topk: int) -> Tensor:
    """(B, A) int64: the object that each point is assigned to, -1 for none.

    Scores are (B, A, K), boxes (B, A, 4). Of the points inside an object, the `topk` best aligned
    are assigned to it: those with the largest score^alpha · IoU^beta, with the score of its class
    (Feng et al., TOOD: Task-aligned One-stage Object Detection, 2021:
    https://arxiv.org/abs/2108.07755). A point chosen by two objects goes to the one with the higher
    IoU. An object smaller than the finest cell counts as large as one, so that a point lies in it.
    """
    if not truth.valid.shape[1]:
        return scores.new_full(scores.shape[:2], -1, dtype=torch.int64)
    centre = (truth.boxes[..., :2] + truth.boxes[..., 2:]) / 2
    half = (truth.boxes[..., 2:] - truth.boxes[..., :2]) / 2
    half = half.clamp(min=float(grid.strides.min()) / 2)
    away = (grid.points - centre[:, :, None]).abs() - half[:, :, None]  # (B, M, A, 2)
    possible = (away <= 0).all(-1) & truth.valid[..., None]
    ious = iou(boxes[:, None], truth.boxes[:, :, None])  # (B, M, A)
    named = truth.labels[..., None].expand(-1, -1, scores.shape[1])
    score = scores.transpose(1, 2).gather(1, named)
    aligned = score.pow(SCORE_POWER) * ious.pow(IOU_POWER)
    aligned = aligned.masked_fill(~possible, -1.0)
    best = aligned.topk(min(topk, aligned.shape[-1]), -1).indices
    chosen = torch.zeros_like(possible).scatter_(-1, best, True) & possible
    value, number = ious.masked_fill(~chosen, -1.0).max(1)
    return number.masked_fill(value < 0, -1)


def losses(outputs: Outputs, grid: Grid, truth: Truths, topk: int, weights: Weights) -> Losses:
    """`loss`, and its parts before they are weighted: `objects`, `classes`, `boxes`, `distances`.

    Each is a mean over the images of a value of one image alone, so it doesn't depend on how a
    global batch is split. The entropy of the targets is subtracted from the cross-entropies, which
    changes no gradient: the loss of a perfect prediction is 0.
    """
    outputs = Outputs(*(logits.float() for logits in outputs))
    boxes, scores = boxes_of(outputs.distances, grid), scores_of(outputs)
    owner = assign(scores.detach(), boxes.detach(), grid, truth, topk)
    count = len(owner)
    image, point = (owner >= 0).nonzero(as_tuple=True)
    mine = owner[image, point]
    box, label = truth.boxes[image, mine], truth.labels[image, mine]
    predicted = boxes[image, point]
    quality = iou(predicted.detach(), box)
    target = torch.zeros_like(outputs.objects)
    target[image, point] = quality
    # At least 1, as with one well predicted object; otherwise the background would dominate.
    total = target.sum(1).clamp(min=1.0)
    share = (quality / total[image]) / count
    objects = F.binary_cross_entropy_with_logits(outputs.objects, target, reduction="none")
    objects[image, point] -= _entropy(quality)
    objects = objects * _outside_of_crowds(boxes.detach(), truth, owner)
    parts = {
        "objects": (objects.sum(1) / total).mean(),
        "classes": F.cross_entropy(outputs.classes[image, point], label, reduction="none") @ share,
        "boxes": (1 - complete_iou(predicted, box)) @ share,
        "distances": _distribution_loss(outputs.distances[image, point], box, grid, point) @ share,
    }
    named = (weights.objects, weights.classes, weights.boxes, weights.distances)
    loss = torch.stack([weight * part for weight, part in zip(named, parts.values())]).sum()
    return {"loss": loss, **parts}


def _distribution_loss(distances: Tensor, box: Tensor, grid: Grid, point: Tensor) -> Tensor:
    """(P, 4, D) -> (P,): distribution focal loss, the cross-entropy with the two bins around the
    true distance (Li et al., Generalized Focal Loss, 2020: https://arxiv.org/abs/2006.04388)."""
    last = distances.shape[-1] - 1
    points, strides = grid.points[point], grid.strides[point, None]
    true = torch.cat([points - box[:, :2], box[:, 2:] - points], 1) / strides
    true = true.clamp(0, last - 0.01)
    lower = true.floor()
    upper_share = true - lower
    logs = distances.log_softmax(-1)
    near = logs.gather(-1, lower.long()[..., None])[..., 0]
    far = logs.gather(-1, lower.long()[..., None] + 1)[..., 0]
    loss = -(near * (1 - upper_share) + far * upper_share) - _entropy(upper_share)
    return loss.mean(-1)


def _entropy(share: Tensor) -> Tensor:
    """Entropy in nats of an event with this probability."""
    return -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))


def _outside_of_crowds(boxes: Tensor, truth: Truths, owner: Tensor) -> Tensor:
    """(B, A): 0 for a box that is assigned to no object and lies at least half in a crowd, else
    1."""
    counted = torch.ones(boxes.shape[:2], device=boxes.device)
    for number, crowds in enumerate(truth.crowds):
        if len(crowds):
            hidden = (share_inside(boxes[number], crowds) >= 0.5).any(1) & (owner[number] < 0)
            counted[number] = counted[number].masked_fill(hidden, 0.0)
    return counted
