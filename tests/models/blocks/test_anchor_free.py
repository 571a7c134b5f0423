from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from models.blocks import anchor_free
from models.blocks.anchor_free import Grid, Outputs, Truths, Weights
from models.core.boxes import iou

SIDE, CLASSES, BINS = 64, 3, 8
STRIDES = (8, 16)


def points() -> Grid:
    return anchor_free.grid([(8, 8), (4, 4)], STRIDES, torch.zeros(1))


def truths(*images: list[tuple[tuple[float, ...], int]], crowd: bool = False) -> Truths:
    boxes = [torch.tensor([box for box, _ in one]).reshape(-1, 4) for one in images]
    labels = [torch.tensor([label for _, label in one], dtype=torch.int64) for one in images]
    return anchor_free.truths(
        boxes, labels, [torch.full((len(one),), crowd, dtype=torch.bool) for one in images]
    )


def outputs(images: int = 1, seed: int = 0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    count = len(points().points)
    shapes = ((images, count), (images, count, CLASSES), (images, count, 4, BINS))
    return Outputs(*(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes))


def knowing(truth: Truths) -> Outputs:
    """The output of a network that predicts the objects exactly, at all points inside of them."""
    grid, logits = points(), outputs(len(truth.boxes))
    objects = torch.full_like(logits.objects, -20.0)
    classes, distances = torch.zeros_like(logits.classes), torch.zeros_like(logits.distances)
    for image, (boxes, labels) in enumerate(zip(truth.boxes, truth.labels)):
        for box, label in zip(boxes, labels):
            x, y = grid.points.T
            sides = torch.stack([x - box[0], y - box[1], box[2] - x, box[3] - y], 1)
            sides = sides / grid.strides[:, None]
            inner = (sides >= 0).all(1) & (sides < BINS - 1).all(1)
            objects[image, inner] = 20.0
            classes[image, inner, label] = 30.0
            lower = sides[inner].floor()
            share = (sides[inner] - lower)[..., None]
            near = F.one_hot(lower.long(), BINS) * (1 - share)
            far = F.one_hot(lower.long() + 1, BINS) * share
            distances[image, inner] = (near + far).clamp(min=1e-9).log()
    return Outputs(objects, classes, distances)


BIG, OTHER = (8.0, 8.0, 40.0, 40.0), (44.0, 40.0, 60.0, 60.0)


def test_points_are_the_centres_of_their_cells():
    grid = points()
    assert grid.points[:2].tolist() == [[4.0, 4.0], [12.0, 4.0]]
    assert grid.points[64].tolist() == [8.0, 8.0]
    assert grid.strides.tolist() == [8.0] * 64 + [16.0] * 16


def test_a_distance_is_the_expected_value_of_its_bins():
    logits = torch.full((1, 80, 4, BINS), -100.0)
    logits[..., 1], logits[..., 2] = 0.0, 0.0  # one and a half strides
    boxes = anchor_free.boxes_of(logits, points())
    assert boxes[0, 0].tolist() == [-8.0, -8.0, 16.0, 16.0]
    assert boxes[0, 64].tolist() == [-16.0, -16.0, 32.0, 32.0]


def test_a_score_is_p_object_times_p_class():
    objects, classes = torch.zeros(1, 2), torch.tensor([[[0.0, 0.0], [100.0, 0.0]]])
    scores = anchor_free.scores_of(Outputs(objects, classes, torch.zeros(1, 2, 4, BINS)))
    assert scores.tolist() == [[[0.25, 0.25], [0.5, pytest.approx(0)]]]


def test_the_best_aligned_points_inside_are_assigned():
    grid, truth = points(), truths([(BIG, 0), (OTHER, 1)])
    boxes = torch.tensor(BIG).expand(1, 80, 4).clone()
    scores = torch.full((1, 80, CLASSES), 0.1)
    inner = ((grid.points >= 8) & (grid.points <= 40)).all(1).nonzero()[:, 0]
    boxes[0, inner[3]] = torch.tensor((8.0, 8.0, 40.0, 30.0))  # a worse box
    scores[0, inner[5], 0] = 0.9
    owner = anchor_free.assign(scores, boxes, grid, truth, 1)
    assert owner[0, inner[5]] == 0
    assert (owner == 0).sum() == 1
    owner = anchor_free.assign(scores, boxes, grid, truth, len(inner) - 1)
    assert owner[0, inner[3]] == -1
    assert (owner[0, inner] == 0).sum() == len(inner) - 1
    assert (owner[0] == 1).sum() > 0
    outside = ((grid.points < 8) | (grid.points > 60)).any(1)
    assert (owner[0, outside] == -1).all()


def test_a_point_in_two_objects_goes_to_the_higher_iou():
    grid, inner = points(), (8.0, 8.0, 24.0, 24.0)
    truth = truths([(BIG, 0), (inner, 1)])
    boxes = torch.tensor(inner).expand(1, 80, 4).clone()
    owner = anchor_free.assign(torch.full((1, 80, CLASSES), 0.5), boxes, grid, truth, 80)
    both = ((grid.points >= 8) & (grid.points <= 24)).all(1)
    assert (owner[0, both] == 1).all()
    assert (owner == 0).any()


def test_an_object_smaller_than_a_cell_gets_a_point():
    for left in range(0, 60, 5):
        truth = truths([((left, 30.0, left + 2.0, 32.0), 0)])
        owner = anchor_free.assign(
            torch.full((1, 80, CLASSES), 0.1), torch.zeros(1, 80, 4), points(), truth, 10
        )
        assert (owner == 0).any(), left


def test_losses_are_zero_for_perfect_and_positive_for_wrong_outputs():
    truth = truths([(BIG, 0), (OTHER, 2)], [(OTHER, 1)])
    losses = anchor_free.losses(knowing(truth), points(), truth, 200, Weights())
    assert all(float(value) < 1e-3 for value in losses.values()), losses
    poor = anchor_free.losses(outputs(2), points(), truth, 200, Weights())
    assert all(float(value.detach()) > 0.1 for value in poor.values()), poor


def test_the_target_of_objectness_is_the_iou():
    """At a point assigned to an object, the loss is lowest where P(object) equals the IoU."""
    truth, logits = truths([(BIG, 0)]), outputs()
    grid = points()
    boxes = anchor_free.boxes_of(logits.distances, grid).detach()
    owner = anchor_free.assign(anchor_free.scores_of(logits).detach(), boxes, grid, truth, 5)
    goal = torch.zeros(80)
    goal[owner[0] == 0] = iou(boxes[0], truth.boxes[0, 0])[owner[0] == 0]
    weights = Weights(boxes=0, distances=0, classes=0)
    loss = anchor_free.losses(logits, grid, truth, 5, weights)["loss"]
    (gradient,) = torch.autograd.grad(loss, logits.objects)
    expected = (logits.objects.sigmoid()[0] - goal).detach() / max(float(goal.sum()), 1)
    torch.testing.assert_close(gradient[0], expected)


def test_the_loss_of_a_batch_is_the_mean_over_its_images():
    images = ([(BIG, 0), (OTHER, 2)], [], [(OTHER, 1)])
    logits = outputs(3)
    together = anchor_free.losses(logits, points(), truths(*images), 10, Weights())
    alone = [
        anchor_free.losses(
            Outputs(*(part[n : n + 1] for part in logits)), points(), truths(one), 10, Weights()
        )
        for n, one in enumerate(images)
    ]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in alone]).mean())


def test_without_objects_every_output_has_a_gradient():
    logits = outputs(2)
    losses = anchor_free.losses(logits, points(), truths([], []), 10, Weights())
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert losses["boxes"] == losses["classes"] == losses["distances"] == 0
    assert (logits.objects.grad > 0).all()
    assert all(part.grad is not None and torch.isfinite(part.grad).all() for part in logits)


def test_crowds_are_excluded_from_the_losses():
    result = knowing(truths([(BIG, 0)]))
    in_crowd = anchor_free.losses(result, points(), truths([(BIG, 0)], crowd=True), 10, Weights())
    nowhere = anchor_free.losses(result, points(), truths([]), 10, Weights())
    assert float(in_crowd["loss"]) < 1e-3
    assert float(nowhere["loss"]) > 10


@pytest.mark.parametrize("box", [(0.0, 0.0, 64.0, 64.0), (0.0, 0.0, 500.0, 500.0)])
def test_distances_beyond_the_bins_have_finite_losses(box):
    logits = outputs()
    losses = anchor_free.losses(logits, points(), truths([(box, 0)]), 10, Weights())
    losses["loss"].backward()
    assert all(torch.isfinite(part.grad).all() for part in logits)
