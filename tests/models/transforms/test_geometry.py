"""Boxes and pixels move together, and clipped boxes keep enough of their area."""

from __future__ import annotations

import torch

from models.transforms.geometry import Placement, inside

HEIGHT, WIDTH = 80, 100


def test_mostly_clipped_boxes_are_dropped():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).expand(3, 4)
    frame = torch.tensor([[0.0, 0.0, 50.0, 50.0], [7.0, 0.0, 50.0, 50.0], [8.0, 0.0, 50.0, 50.0]])
    cut, kept = inside(boxes, frame, 0.25)
    assert kept.tolist() == [True, True, False]
    assert cut[1].tolist() == [7.0, 0.0, 10.0, 10.0]
    _, kept = inside(boxes[:1] + 100, frame[:1], 0.0)
    assert not kept.any()


def test_a_placement_moves_pixels_and_boxes_together():
    image = torch.zeros(1, 1, HEIGHT, WIDTH)
    image[..., 20:40, 10:60] = 1
    placement = Placement(torch.tensor([[0.5, -1.0]]), torch.tensor([[4.0, 90.0]]))
    moved = placement.images(image)
    box = placement.boxes(torch.tensor([[10.0, 20.0, 60.0, 40.0]]), torch.tensor([0]))
    assert box.tolist() == [[30.0, 14.0, 80.0, 24.0]]
    expected = torch.zeros(HEIGHT, WIDTH)
    expected[14:24, 30:80] = 1
    torch.testing.assert_close(moved[0, 0], expected)
    assert placement.images(image * 7, nearest=True).unique().tolist() == [0.0, 7.0]
