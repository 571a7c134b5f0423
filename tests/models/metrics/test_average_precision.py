from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from pycocotools import mask as run_lengths

from models.metrics import average_precision
from models.metrics.average_precision import metric_names, metrics

CLASSES = ("red", "white")
LEFT, RIGHT = (10.0, 10.0, 30.0, 30.0), (60.0, 10.0, 80.0, 30.0)
EMPTY = (40.0, 70.0, 60.0, 90.0)


def record(found=(), truth=(), crowd=()) -> dict:
    """`predicted`: (box, score, label); `truth`: (box, label); `crowd`: indices of crowds in
    truth."""
    marks = [position in crowd for position in range(len(truth))]
    return {
        "size": (100, 100),
        "boxes": torch.tensor([box for box, _, _ in found]).reshape(-1, 4),
        "scores": torch.tensor([score for _, score, _ in found]),
        "labels": torch.tensor([label for _, _, label in found], dtype=torch.int64),
        "true_boxes": torch.tensor([box for box, _ in truth]).reshape(-1, 4),
        "true_labels": torch.tensor([label for _, label in truth], dtype=torch.int64),
        "true_crowd": torch.tensor(marks, dtype=torch.bool),
    }


def test_perfect_predictions_have_map_one(capsys):
    both = [(LEFT, 0), (RIGHT, 1)]
    one = record([(LEFT, 0.9, 0), (RIGHT, 0.8, 1)], both)
    result = metrics([one, record()], CLASSES)
    assert list(result) == ["map", "map50", "map75", "map/red", "map/white"]
    assert list(result.values()) == pytest.approx([1] * 5)
    assert capsys.readouterr().out == ""


def test_a_box_is_a_match_at_thresholds_below_its_iou():
    wide = (10.0, 10.0, 30.0, 40.0)  # 20 by 20 of 20 by 30: an overlap of 2/3
    result = metrics([record([(wide, 0.9, 0)], [(LEFT, 0)])], CLASSES)
    assert result["map50"] == pytest.approx(1)
    assert result["map75"] == 0.0
    assert result["map"] == pytest.approx(4 / 10)  # 0.5, 0.55, 0.6, 0.65


def test_a_false_positive_with_a_higher_score_costs_precision():
    """Precision is 1/2 at every recall. With a lower score than the match, it has no effect."""
    truth = [(LEFT, 0)]
    before = record([(EMPTY, 0.9, 0), (LEFT, 0.5, 0)], truth)
    after = record([(EMPTY, 0.4, 0), (LEFT, 0.5, 0)], truth)
    assert metrics([before], CLASSES)["map"] == pytest.approx(0.5)
    assert metrics([after], CLASSES)["map"] == pytest.approx(1)


def test_half_of_the_objects_predicted():
    """Precision 1 at the recalls 0, 0.01 … 0.5, which are 51 of 101."""
    one = record([(LEFT, 0.9, 0)], [(LEFT, 0), (RIGHT, 0)])
    assert metrics([one], CLASSES)["map"] == pytest.approx(51 / 101)


def test_a_second_box_on_an_object_is_a_false_positive():
    twice = record([(LEFT, 0.9, 0), (LEFT, 0.8, 0), (RIGHT, 0.7, 0)], [(LEFT, 0), (RIGHT, 0)])
    # the second is a mistake: at recalls above 0.5 the precision is 2/3
    assert metrics([twice], CLASSES)["map"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_another_class_is_wrong_and_absent_classes_have_no_metric():
    result = metrics([record([(LEFT, 0.9, 1)], [(LEFT, 0)])], CLASSES)
    assert result == {"map": 0.0, "map50": 0.0, "map75": 0.0, "map/red": 0.0}


def test_crowds_are_ignored():
    crowd = (50.0, 0.0, 100.0, 50.0)
    truth = [(LEFT, 0), (crowd, 0)]
    result = [(RIGHT, 0.9, 0), (LEFT, 0.5, 0)]
    assert metrics([record(result, truth, crowd={1})], CLASSES)["map"] == pytest.approx(1)
    assert metrics([record(result, truth)], CLASSES)["map"] < 0.5  # control: as an object
    only = metrics([record(result[:1], [(crowd, 0)], crowd={0})], CLASSES)
    assert only == {"map": 0.0, "map50": 0.0, "map75": 0.0}


@pytest.mark.parametrize("result", [(), [(LEFT, 0.9, 0)]])
@pytest.mark.parametrize("truth", [(), [(RIGHT, 0)]])
def test_no_predictions_or_no_truth_is_finite(result, truth):
    values = metrics([record(result, truth)], CLASSES)
    assert {"map", "map50", "map75"} <= values.keys()
    assert set(values.values()) == {0.0}
    assert set(metrics([], CLASSES).values()) == {0.0}


def test_metrics_do_not_depend_on_the_order_of_images_and_objects():
    rng = random.Random(0)

    def box() -> tuple[float, ...]:
        left, top = rng.uniform(0, 60), rng.uniform(0, 60)
        return (left, top, left + rng.uniform(5, 40), top + rng.uniform(5, 40))

    records = []
    for _ in range(12):
        truth = [(box(), rng.randrange(2)) for _ in range(rng.randrange(6))]
        result = [
            (tuple(side + rng.uniform(-3, 3) for side in where), rng.random(), label)
            for where, label in truth
        ]
        result += [(box(), rng.random(), rng.randrange(2)) for _ in range(4)]
        records.append((result, truth))
    first = metrics([record(*one) for one in records], CLASSES)
    assert 0.1 < first["map"] < 0.9
    rng.shuffle(records)
    again = [record(rng.sample(f, len(f)), rng.sample(t, len(t))) for f, t in records]
    assert metrics(again, CLASSES) == first


def test_only_the_highest_scores_of_an_image_are_used():
    positions = [(20.0 * (i % 5), 20.0 * (i // 5)) for i in range(20)]
    boxes = [(left, top, left + 15, top + 15) for left, top in positions]
    one = record([(b, 0.9 - i / 100, 0) for i, b in enumerate(boxes)], [(b, 0) for b in boxes])
    assert metrics([one], CLASSES)["map"] == pytest.approx(1)
    assert metrics([one], CLASSES, max_detections=10)["map"] == pytest.approx(51 / 101)


def encode(box) -> bytes:
    pixels = np.zeros((100, 100), np.uint8, order="F")
    left, top, right, bottom = (int(side) for side in box)
    pixels[top:bottom, left:right] = 1
    return run_lengths.encode(pixels)["counts"]


def test_masks_are_compared_by_their_pixels():
    half = (10.0, 10.0, 30.0, 22.0)  # 12 of 20 rows: an overlap of 0.6
    one = record([(LEFT, 0.9, 0)], [(LEFT, 0)])
    one |= {"masks": [encode(half)], "true_masks": [encode(LEFT)]}
    assert metrics([one], CLASSES, "segm")["map"] == pytest.approx(3 / 10)
    assert metrics([one], CLASSES, "bbox")["map"] == pytest.approx(1)
    crowd = record([(LEFT, 0.9, 0), (RIGHT, 0.95, 0)], [(LEFT, 0), (RIGHT, 0)], crowd={1})
    crowd |= {"masks": [encode(LEFT), encode(RIGHT)], "true_masks": [encode(LEFT), encode(RIGHT)]}
    assert metrics([crowd], CLASSES, "segm")["map"] == pytest.approx(1)


def test_metric_names_are_valid_and_unique():
    from mlflow.utils.validation import _validate_metric_name

    classes = ("RBC", "rbc", "a/b", "a b", "a:b", "..", "", "Zelle/ü", "RBC-2", "x" * 300, "\n")
    names = metric_names(classes)
    assert names[0] == "RBC"
    assert len({name.lower() for name in names}) == len(classes)
    for name in names:
        _validate_metric_name(f"val/map/{name}")


def test_at_most_fifty_classes_have_their_own_metric():
    classes = [f"class {k}" for k in range(60)]
    records = [record([(LEFT, 0.9, k)], [(LEFT, k)]) for k in range(60)]
    result = metrics(records, classes)
    assert result["map"] == pytest.approx(1)
    assert len(result) == 3 + average_precision.NAMED_CLASSES
    assert all(math.isfinite(value) for value in result.values())
