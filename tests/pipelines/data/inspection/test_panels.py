"""Samples as panels: their annotations are drawn, at a limited size."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco

from pipelines.data.annotations import Mask, Objects
from pipelines.data.inspection.panels import make_panel


def test_objects_are_scaled_with_their_image() -> None:
    pixels = np.zeros((40, 60), np.uint8, order="F")
    pixels[10:30, 20:50] = 1
    objects = Objects(
        np.array([[20.0, 10.0, 50.0, 30.0]]),
        np.array([2]),
        np.array([True]),
        (coco.encode(pixels)["counts"],),
    )
    image = Image.new("L", (60, 40), 7)
    full, half = (make_panel(image, objects, max_side=side) for side in (100, 30))
    assert full.image.shape == (3, 40, 60)
    assert (full.image == 7).all()
    assert half.image.shape == (3, 20, 30)
    for panel, factor in ((full, 1.0), (half, 0.5)):
        assert panel.boxes is not None
        assert panel.labels is not None
        assert panel.crowd is not None
        assert panel.masks is not None
        assert (panel.boxes / factor).tolist() == objects.boxes.tolist()
        assert (panel.labels.tolist(), panel.crowd.tolist()) == ([2], [True])
        expected = np.zeros(panel.image.shape[1:], np.uint8)
        left, top, right, bottom = (objects.boxes[0] * factor).astype(int)
        expected[top:bottom, left:right] = 1
        assert torch.equal(panel.masks[0], torch.from_numpy(expected))


def test_panels_of_masks_and_of_images_without_annotation() -> None:
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image = Image.new("RGB", (3, 2))
    panel = make_panel(image, Mask(mask), max_side=320)
    assert panel.mask is not None
    assert panel.mask.tolist() == mask.tolist()
    assert make_panel(image, None, max_side=320).mask is None
