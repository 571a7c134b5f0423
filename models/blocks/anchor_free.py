"""Boxes found at the points of a grid, without anchors: who answers for which object, and the losses.

In: what a network says at every point, and the true boxes. Out: losses, or boxes with scores. Must
not know how the network is built, nor the files or the task.

    B images, A points of all scales, K classes, M truths of an image, P points with a truth
    D bins of a distance

A point has a place in pixels and the stride of its scale. At it a network says, as logits: `object`
(B, A), `classes` (B, A, K), and `distances` (B, A, 4, D) from the point to left, top, right and
bottom, in strides.

The score of a class is P(object) · P(class | object), and P(object) is taught to be the overlap of
the box with its truth: "Pr(Class_i | Object) * Pr(Object) * IOU" in Redmon et al., You Only Look
Once, 2016 (https://arxiv.org/abs/1506.02640, equation 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from models.core.boxes import complete_overlap, covered, overlap
from models.core.family import Losses

SCORE_POWER, OVERLAP_POWER = 0.5, 6.0
"""Of the alignment (Feng et al., TOOD, 2021): how much the score says, and how much the overlap."""


class Grid(NamedTuple):
    """`points` (A, 2): x and y in pixels; `strides` (A,), in pixels."""

    points: Tensor
    strides: Tensor


class Said(NamedTuple):
    """What a network says at the points: logits, see above."""

    objects: Tensor
    classes: Tensor
    distances: Tensor


class Truths(NamedTuple):
    """Padded to the most of an image: `boxes` (B, M, 4), `labels` (B, M), `given` (B, M) bool, and
    `crowds`, a list of boxes (·, 4) an image."""

    boxes: Tensor
    labels: Tensor
    given: Tensor
    crowds: list[Tensor]


@dataclass(frozen=True)
class Weights:
    """How much each loss counts."""

    objects: float = 1.0
    classes: float = 0.5
    boxes: float = 2.0
    bins: float = 0.5


def grid(shapes: Sequence[tuple[int, int]], strides: Sequence[int], like: Tensor) -> Grid:
    """The middles of the cells of maps of those shapes (height, width), scale by scale."""
    points, lengths = [], []
    for (height, width), stride in zip(shapes, strides):
        rows = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) * stride
        columns = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) * stride
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).reshape(-1, 2)
        points.append(places)
        lengths.append(torch.full_like(places[:, 0], stride))
    return Grid(torch.cat(points), torch.cat(lengths))


def boxes_of(distances: Tensor, at: Grid) -> Tensor:
    """(B, A, 4, D) logits -> (B, A, 4) in pixels. A distance is the mean over its bins."""
    bins = torch.arange(distances.shape[-1], device=distances.device, dtype=torch.float32)
    lengths = (distances.softmax(-1) @ bins) * at.strides[:, None]
    return torch.cat([at.points - lengths[..., :2], at.points + lengths[..., 2:]], -1)


def scores_of(said: Said) -> Tensor:
    """(B, A, K): P(object) · P(class | object)."""
    return said.objects.sigmoid()[..., None] * said.classes.softmax(-1)


def truths(boxes: list[Tensor], labels: list[Tensor], crowd: list[Tensor]) -> Truths:
    """Crowds are set apart: they are no objects to be found."""
    single = [~one for one in crowd]
    counts = torch.stack([one.sum() for one in single])
    padded = pad_sequence([b[one] for b, one in zip(boxes, single)], batch_first=True)
    names = pad_sequence([k[one] for k, one in zip(labels, single)], batch_first=True)
    given = torch.arange(padded.shape[1], device=padded.device) < counts[:, None]
    return Truths(padded.float(), names, given, [b[c].float() for b, c in zip(boxes, crowd)])


@torch.no_grad()
def assign(scores: Tensor, boxes: Tensor, at: Grid, truth: Truths, most: int) -> Tensor:
    """(B, A) int64: the truth that each point answers for, -1 for none.

    Scores are (B, A, K), boxes (B, A, 4). Of the points inside of a truth the `most` best aligned
    answer for it: those with the largest score^a · overlap^b, of the score of its class (Feng et
    al., TOOD: Task-aligned One-stage Object Detection, 2021: https://arxiv.org/abs/2108.07755). A
    point that is chosen twice answers for the truth that its box overlaps more. A truth smaller than
    the finest cell is taken as large as one, so that there is a point in it.
    """
    if not truth.given.shape[1]:
        return scores.new_full(scores.shape[:2], -1, dtype=torch.int64)
    middle = (truth.boxes[..., :2] + truth.boxes[..., 2:]) / 2
    half = (truth.boxes[..., 2:] - truth.boxes[..., :2]) / 2
    half = half.clamp(min=float(at.strides.min()) / 2)
    away = (at.points - middle[:, :, None]).abs() - half[:, :, None]  # (B, M, A, 2)
    possible = (away <= 0).all(-1) & truth.given[..., None]
    found = overlap(boxes[:, None], truth.boxes[:, :, None])  # (B, M, A)
    named = truth.labels[..., None].expand(-1, -1, scores.shape[1])
    score = scores.transpose(1, 2).gather(1, named)
    aligned = score.pow(SCORE_POWER) * found.pow(OVERLAP_POWER)
    aligned = aligned.masked_fill(~possible, -1.0)
    best = aligned.topk(min(most, aligned.shape[-1]), -1).indices
    chosen = torch.zeros_like(possible).scatter_(-1, best, True) & possible
    value, number = found.masked_fill(~chosen, -1.0).max(1)
    return number.masked_fill(value < 0, -1)


def losses(said: Said, at: Grid, truth: Truths, most: int, weights: Weights) -> Losses:
    """`loss`, and its parts before they are weighted: `objects`, `classes`, `boxes`, `bins`.

    Each is a mean over the images of what belongs to an image alone, so that it doesn't matter how
    a batch is cut. From the cross-entropies the entropy of the goal is taken, which changes no
    gradient: the loss of a perfect answer is 0.
    """
    said = Said(*(logits.float() for logits in said))
    boxes, scores = boxes_of(said.distances, at), scores_of(said)
    owner = assign(scores.detach(), boxes.detach(), at, truth, most)
    count = len(owner)
    image, point = (owner >= 0).nonzero(as_tuple=True)
    mine = owner[image, point]
    box, label = truth.boxes[image, mine], truth.labels[image, mine]
    found = boxes[image, point]
    quality = overlap(found.detach(), box)
    goal = torch.zeros_like(said.objects)
    goal[image, point] = quality
    # What an image with one badly found object has; less would let the points without one reign.
    total = goal.sum(1).clamp(min=1.0)
    share = (quality / total[image]) / count
    unlike = F.binary_cross_entropy_with_logits(said.objects, goal, reduction="none")
    unlike[image, point] -= _entropy(quality)
    unlike = unlike * _outside_of_crowds(boxes.detach(), truth, owner)
    parts = {
        "objects": (unlike.sum(1) / total).mean(),
        "classes": (F.cross_entropy(said.classes[image, point], label, reduction="none") @ share),
        "boxes": (1 - complete_overlap(found, box)) @ share,
        "bins": _bins(said.distances[image, point], box, at, point) @ share,
    }
    named = (weights.objects, weights.classes, weights.boxes, weights.bins)
    loss = torch.stack([weight * part for weight, part in zip(named, parts.values())]).sum()
    return {"loss": loss, **parts}


def _bins(distances: Tensor, box: Tensor, at: Grid, point: Tensor) -> Tensor:
    """(P, 4, D) -> (P,): the divergence from both bins beside the true distance, weighted by how
    near they are (Li et al., Generalized Focal Loss, 2020: https://arxiv.org/abs/2006.04388)."""
    last = distances.shape[-1] - 1
    places, strides = at.points[point], at.strides[point, None]
    true = torch.cat([places - box[:, :2], box[:, 2:] - places], 1) / strides
    true = true.clamp(0, last - 0.01)
    lower = true.floor()
    upper_share = true - lower
    logs = distances.log_softmax(-1)
    near = logs.gather(-1, lower.long()[..., None])[..., 0]
    far = logs.gather(-1, lower.long()[..., None] + 1)[..., 0]
    unlike = -(near * (1 - upper_share) + far * upper_share) - _entropy(upper_share)
    return unlike.mean(-1)


def _entropy(share: Tensor) -> Tensor:
    """Of yes or no, in nats."""
    return -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))


def _outside_of_crowds(boxes: Tensor, truth: Truths, owner: Tensor) -> Tensor:
    """(B, A): 0 for a box without a truth that lies in a crowd by half, else 1."""
    counted = torch.ones(boxes.shape[:2], device=boxes.device)
    for number, crowds in enumerate(truth.crowds):
        if len(crowds):
            hidden = (covered(boxes[number], crowds) >= 0.5).any(1) & (owner[number] < 0)
            counted[number] = counted[number].masked_fill(hidden, 0.0)
    return counted
