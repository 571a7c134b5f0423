from __future__ import annotations

import torch

from models.core.boxes import areas, complete_iou, iou, pairwise_iou, share_inside


def drawn(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 50
    sides = torch.rand(count, 2, generator=generator) * 40 + 1
    return torch.cat([corners, corners + sides], 1)


def test_iou_agrees_with_torchvision():
    from torchvision.ops import box_iou

    boxes, others = drawn(20, 0), drawn(30, 1)
    torch.testing.assert_close(pairwise_iou(boxes, others), box_iou(boxes, others))
    torch.testing.assert_close(iou(boxes, boxes + 3), box_iou(boxes, boxes + 3).diagonal())


def test_complete_iou_and_its_gradient_agree_with_torchvision():
    from torchvision.ops import complete_box_iou_loss

    boxes, others = drawn(40, 0).requires_grad_(), drawn(40, 1)
    theirs = complete_box_iou_loss(boxes, others, reduction="none")
    ours = 1 - complete_iou(boxes, others)
    torch.testing.assert_close(ours, theirs)
    (expected,) = torch.autograd.grad(theirs.sum(), boxes)
    (result,) = torch.autograd.grad(ours.sum(), boxes)
    torch.testing.assert_close(result, expected)


def test_boxes_without_an_area_are_finite():
    flat = torch.tensor([[5.0, 5.0, 5.0, 5.0]]).requires_grad_()
    assert areas(flat).tolist() == iou(flat, flat).tolist() == [0]
    complete_iou(flat, torch.tensor([[5.0, 5.0, 5.0, 5.0]])).sum().backward()
    assert torch.isfinite(flat.grad).all()
    assert float(areas(torch.tensor([8.0, 8.0, 5.0, 5.0]))) == 0


def test_share_inside_is_relative_to_the_first_box():
    small, large = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[2.0, 0.0, 100.0, 100.0]])
    assert float(share_inside(small, large)) == 0.5
    assert float(share_inside(large, small)) < 0.01
