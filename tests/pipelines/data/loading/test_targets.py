"""Boxes and masks are scaled and cropped with their image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from white_boxes import HEIGHT, WIDTH, box_image, load, make

from pipelines.data.annotations import IGNORED


@pytest.mark.parametrize("size", [(20, 30), (12, 16), (40, 60), (26, 18), (9, 41)])
def test_a_crop_moves_boxes_and_masks(tmp_path: Path, size: tuple[int, int]) -> None:
    """Boxes and masks are where the white pixels are, whichever sides are cut or extended."""
    for task in ("instance_segmentation", "semantic_segmentation"):
        folder, card = make(tmp_path / task, task)
        batch = load(folder, card, card.spec(*size), fit="crop")
        assert batch["image"].shape == (10, 1, *size)
        for number in range(10):
            white = batch["image"][number, 0] == 255
            if task == "semantic_segmentation":
                mask = batch["mask"][number]
                assert torch.equal(mask == 1 + number % 2, white & (mask != IGNORED))
                assert ((mask == IGNORED).sum() > 0) == (size[0] > HEIGHT or size[1] > WIDTH)
            elif number != 4:
                assert torch.equal(batch["masks"][number][0], white.to(torch.uint8))
                rows, columns = np.nonzero(white.numpy())
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert batch["boxes"][number].tolist() == [box]


def test_a_stretch_scales_boxes_and_masks(tmp_path: Path) -> None:
    folder, card = make(tmp_path / "i", "instance_segmentation")
    batch = load(folder, card, card.spec(40, 90))
    for number in (0, 1, 7):
        left, top, right, bottom = box_image(number)[1]
        assert batch["boxes"][number].tolist() == [[left * 3, top * 2, right * 3, bottom * 2]]
        expected = torch.zeros((40, 90), dtype=torch.uint8)
        expected[top * 2 : bottom * 2, left * 3 : right * 3] = 1
        assert torch.equal(batch["masks"][number][0], expected)
    assert batch["size"].tolist() == [[HEIGHT, WIDTH]] * 10
    folder, card = make(tmp_path / "s", "semantic_segmentation")
    batch = load(folder, card, card.spec(40, 90))
    assert batch["mask"][1].max() == 2
    assert (batch["mask"][1] == 2).sum() == 6 * (batch["mask"][1, ::2, ::3] == 2).sum()


def test_an_object_outside_the_crop_is_dropped(tmp_path: Path) -> None:
    folder, card = make(tmp_path, "detection")
    batch = load(folder, card, card.spec(2, 2), fit="crop")
    for number in range(10):
        left, top, right, bottom = box_image(number)[1]
        inside = number != 4 and left < 16 and right > 14 and top < 11 and bottom > 9
        assert len(batch["boxes"][number]) == len(batch["labels"][number]) == inside
        assert len(batch["crowd"][number]) == inside
    counts = [len(boxes) for boxes in batch["boxes"]]
    assert 0 < sum(counts) < 9
