"""Instance segmentation: metrics by pixels, predictions in COCO's format, and masks of the image
size."""

from __future__ import annotations

import dataclasses
import json

import examples
import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from models.core.errors import TesseraError
from models.core.family import View
from models.tasks.instance_segmentation import INSTANCE_SEGMENTATION as TASK
from models.tasks.instance_segmentation import run_lengths
from models.transforms.mask_augment import boxes_of
from pipelines.data import rle
from pipelines.data.images import fit_image, view

DATA = dataclasses.replace(
    examples.SPECS["instance_segmentation"], mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)


def mask(left, top, right, bottom, size=(20, 30)):
    pixels = torch.zeros(size, dtype=torch.uint8)
    pixels[top:bottom, left:right] = 1
    return pixels


def said(*masks, labels=None, scores=None, crowd=None, size=(20, 30)):
    """A target, or a prediction if there are scores."""
    stacked = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)
    fields = {
        "boxes": boxes_of(stacked),
        "labels": torch.tensor(labels or [0] * len(masks), dtype=torch.int64),
        "masks": stacked,
    }
    if scores is not None:
        return fields | {"scores": torch.tensor(scores, dtype=torch.float32)}
    crowds = torch.tensor(crowd or [False] * len(masks), dtype=torch.bool)
    return fields | {"crowd": crowds, "size": size}


def decoded(counts, height, width):
    """Decoded by our own reader; pycocotools' decoder raises a warning with NumPy 2."""
    return rle.to_mask(rle.parse(counts, height, width), height, width)


def metrics(*pairs):
    return TASK.metrics([TASK.make_record(p, t, DATA) for p, t in pairs], DATA)


class TestMetrics:
    def test_are_one_for_perfect_predictions(self):
        one, other = mask(2, 3, 12, 9), mask(14, 4, 28, 18)
        truth = said(one, other, labels=[0, 2])
        result = metrics((said(other, one, labels=[2, 0], scores=[0.9, 0.8]), truth))
        assert set(result) == {
            f"{kind}_{name}"
            for kind in ("mask", "box")
            for name in ("map", "map50", "map75", "map/cat", "map/owl")
        }
        assert all(value == pytest.approx(1) for value in result.values())

    def test_compare_the_pixels_of_masks(self):
        """A frame with the right outline, which has 24 of 100 pixels."""
        whole, frame = mask(0, 0, 10, 10), mask(0, 0, 10, 10)
        frame[1:9, 1:9] = 0
        thick = mask(0, 0, 10, 10)
        thick[4:6, 1:9] = 0  # 84 of 100: right up to an overlap of 0.8, 7 of 10 thresholds
        result = metrics((said(frame, scores=[0.9]), said(whole)))
        assert (result["mask_map"], result["box_map"]) == (0, pytest.approx(1))
        result = metrics((said(thick, scores=[0.9]), said(whole)))
        assert result["mask_map"] == pytest.approx(0.7)
        assert result["mask_map75"] == pytest.approx(1)

    def test_ignore_crowds(self):
        objects = (mask(0, 0, 8, 8), mask(10, 0, 30, 20))
        inside = mask(12, 2, 20, 10)
        prediction = said(inside, objects[0], scores=[0.9, 0.8])
        result = metrics((prediction, said(*objects, crowd=[False, True])))
        assert result["mask_map50"] == pytest.approx(1)
        result = metrics((prediction, said(*objects)))
        assert result["mask_map50"] < 0.6

    def test_are_finite_without_objects(self):
        empty = (said(scores=[]), said())
        assert metrics(empty)["mask_map"] == 0
        right = (said(mask(0, 0, 9, 9), scores=[0.9]), said(mask(0, 0, 9, 9)))
        false = (said(mask(0, 0, 9, 9), scores=[0.95]), said())
        assert metrics(empty, right)["mask_map50"] == pytest.approx(1)
        assert metrics(false, right)["mask_map50"] == pytest.approx(0.5)

    def test_need_masks_of_the_image_size(self):
        with pytest.raises(TesseraError, match="the image has"):
            TASK.make_record(said(mask(0, 0, 5, 5, (20, 20)), scores=[0.5]), said(), DATA)

    def test_run_lengths_agree_with_coco(self):
        pixels = torch.rand(3, 17, 23, generator=torch.Generator().manual_seed(0)) < 0.3
        for counts, expected in zip(run_lengths(pixels.byte()), pixels):
            assert np.array_equal(decoded(counts, 17, 23), expected.numpy())


class TestPredictions:
    def test_have_run_lengths_in_json(self):
        answer = TASK.prediction_to_json(said(mask(3, 4, 12, 9), labels=[1], scores=[0.75]), DATA)
        (result,) = json.loads(json.dumps(answer))["objects"]
        assert (result["class"], result["score"]) == ("dog", 0.75)
        assert result["box"] == [3, 4, 12, 9]
        assert result["mask"]["size"] == [20, 30]
        pixels = decoded(result["mask"]["counts"].encode(), 20, 30)
        assert np.array_equal(pixels, mask(3, 4, 12, 9).numpy())

    def test_can_be_written_as_coco_results(self):
        prediction = said(mask(3, 4, 12, 9), labels=[1], scores=[0.75])
        (result,) = json.loads(json.dumps(TASK.prediction_to_coco(prediction)))
        assert result["bbox"] == [3, 4, 9, 5]
        assert result["category_id"] == 2
        assert coco.area(result["segmentation"]) == 45

    def test_are_empty_without_objects(self):
        assert TASK.prediction_to_json(said(scores=[]), DATA) == {"objects": []}
        assert TASK.prediction_to_coco(said(scores=[])) == []

    def test_are_drawn_next_to_the_truth(self):
        truth = said(mask(0, 0, 9, 9), mask(10, 0, 20, 9))
        answer = said(mask(0, 0, 9, 9), mask(1, 1, 9, 9), scores=[0.9, 0.1])
        panels = TASK.panels(torch.zeros(3, 20, 30, dtype=torch.uint8), answer, truth, DATA)
        assert [len(panel.masks) for panel in panels] == [2, 1]


class TestOriginalSize:
    """Masks are converted back from the size that `fit_image` made."""

    @pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
    @pytest.mark.parametrize("size", [(20, 30), (90, 50), (31, 64), (150, 200)])
    def test_masks_match_the_image(self, fit, size):
        frame = (64, 48)
        height, width = size
        middle = (width // 3, height // 3, width * 2 // 3, height * 2 // 3)
        truth = mask(*middle, size)
        seen = fit_image(truth[None] * 255, *frame, fit)[0] >= 128
        where = view(size, *frame, fit)
        inner = tuple(round(side * scale) for side, scale in zip(size, where.scale))
        if fit == "pad":
            seen = seen[: inner[0], : inner[1]]
        prediction = said(seen.byte(), scores=[0.5], size=tuple(seen.shape))
        restored = TASK.to_original_size(prediction, where)
        assert restored["masks"].shape == (1, *size)
        expected = truth.clone()
        if fit == "crop":  # of what was cut off nothing is known
            down, right = where.shift
            kept = torch.zeros_like(truth)
            top, left = max(0, -down), max(0, -right)
            kept[top : top + frame[0], left : left + frame[1]] = 1
            expected *= kept
        common = int((restored["masks"][0] & expected).sum())
        assert common / int((restored["masks"][0] | expected).sum()) > 0.85
        overlap = boxes_of(restored["masks"])[0] - restored["boxes"][0]
        assert overlap.abs().max() <= 4

    def test_objects_outside_the_image_are_dropped(self):
        """A crop extends the edge of a small image; an object may be predicted there."""
        where = View((10, 10), (20, 30), shift=(5, 10))
        prediction = said(mask(0, 0, 8, 4), mask(12, 6, 18, 12), scores=[0.9, 0.8])
        restored = TASK.to_original_size(prediction, where)
        assert restored["scores"].tolist() == pytest.approx([0.8])
        assert torch.equal(restored["masks"][0], mask(2, 1, 8, 7, (10, 10)))
