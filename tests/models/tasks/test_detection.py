from __future__ import annotations

import json

import pytest
import torch

from models.core.errors import TesseraError
from models.core.family import DataSpec, View
from models.tasks.detection import DETECTION
from pipelines.data.images import fit_image, view

DATA = DataSpec("detection", 3, 100, 100, ("red", "white"), (0.5,) * 3, (0.2,) * 3)
LEFT, RIGHT = [10.0, 10.0, 30.0, 30.0], [60.0, 10.0, 80.0, 30.0]


def said(*objects) -> dict:
    """`objects`: (box, score, label)."""
    return {
        "boxes": torch.tensor([box for box, _, _ in objects]).reshape(-1, 4),
        "scores": torch.tensor([score for _, score, _ in objects]),
        "labels": torch.tensor([label for _, _, label in objects], dtype=torch.int64),
    }


def true(*objects) -> dict:
    """`objects`: (box, label, crowd)."""
    return {
        "size": (100, 100),
        "boxes": torch.tensor([box for box, _, _ in objects]).reshape(-1, 4),
        "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
        "crowd": torch.tensor([crowd for _, _, crowd in objects], dtype=torch.bool),
    }


def record(prediction, target):
    return DETECTION.make_record(prediction, target, DATA)


def test_targets_have_the_size_without_padding_and_are_on_the_cpu():
    batch = {
        "extent": torch.tensor([[80, 60], [100, 100]]),
        "boxes": [torch.tensor([LEFT]), torch.zeros(0, 4)],
        "labels": [torch.tensor([1]), torch.zeros(0, dtype=torch.int64)],
        "crowd": [torch.tensor([True]), torch.zeros(0, dtype=torch.bool)],
    }
    first, second = DETECTION.targets(batch)
    assert first["size"] == (80, 60)
    assert first["boxes"].tolist() == [LEFT]
    assert first["crowd"].tolist() == [True]
    assert second["labels"].tolist() == []


def test_metrics_name_the_classes():
    truth = true((LEFT, 0, False), (RIGHT, 1, False))
    good = record(said((LEFT, 0.9, 0), (RIGHT, 0.8, 1)), truth)
    metrics = DETECTION.metrics([good], DATA)
    assert metrics == pytest.approx(
        {"map": 1, "map50": 1, "map75": 1, "map/red": 1, "map/white": 1}
    )
    half = DETECTION.metrics([good, record(said((LEFT, 0.9, 0)), truth)], DATA)
    assert half["map/red"] == pytest.approx(1)
    assert half["map/white"] == pytest.approx(51 / 101)
    with pytest.raises(TesseraError, match="no predictions"):
        DETECTION.metrics([], DATA)


def test_labels_out_of_range_are_refused():
    with pytest.raises(TesseraError, match="target has class 2"):
        record(said(), true((LEFT, 2, False)))
    with pytest.raises(TesseraError, match="prediction has class -1"):
        record(said((LEFT, 0.5, -1)), true())


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        (said(), true(), 0),
        (said((LEFT, 0.9, 0)), true((LEFT, 0, False)), 0),
        (said((LEFT, 0.9, 1)), true((LEFT, 0, False)), 1),  # another class
        (said((LEFT, 0.1, 0)), true((LEFT, 0, False)), 1),  # too little certain to be drawn
        (said((LEFT, 0.1, 0)), true(), 0),
        (said((LEFT, 0.9, 0)), true((LEFT, 0, False), (RIGHT, 0, False)), 1 / 3),  # F1 2/3
        (said((LEFT, 0.9, 0), (LEFT, 0.8, 0)), true((LEFT, 0, False)), 1 / 3),  # twice
        (said((LEFT, 0.9, 0)), true(([0.0, 0.0, 100.0, 100.0], 0, True)), 0),  # in a crowd
        (said((RIGHT, 0.9, 0)), true(([0.0, 0.0, 40.0, 40.0], 0, True)), 1),
        (said(), true((LEFT, 0, True)), 0),
    ],
)
def test_error_score_is_one_minus_f1(prediction, target, expected):
    assert DETECTION.error_score(record(prediction, target)) == pytest.approx(expected)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(40, 50), (160, 120), (64, 300)])
def test_boxes_are_converted_to_the_image_size(fit, size):
    """A rectangle is painted, the image fitted, and the box converted back."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    middle = (size[0] // 2, size[1] // 2)
    box = (middle[1] - 12, middle[0] - 8, middle[1] + 10, middle[0] + 16)
    image[:, box[1] : box[3], box[0] : box[2]] = 255
    seen = fit_image(image, 96, 96, fit)[0] > 127
    rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
    result = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    restored = DETECTION.to_original_size(
        said(([float(f) for f in result], 0.9, 0)), view(size, 96, 96, fit)
    )
    scale = max(size[0] / 96, size[1] / 96, 1.0)
    torch.testing.assert_close(
        restored["boxes"][0], torch.tensor(box, dtype=torch.float32), atol=scale, rtol=0
    )


def test_objects_outside_the_image_are_dropped():
    prediction = said(([0.0, 0.0, 9.0, 9.0], 0.9, 0), ([5.0, 5.0, 50.0, 200.0], 0.8, 1))
    restored = DETECTION.to_original_size(prediction, View((40, 60), (96, 96), shift=(28, 18)))
    assert restored["boxes"].tolist() == [[0.0, 0.0, 32.0, 40.0]]
    assert restored["scores"].tolist() == pytest.approx([0.8])
    assert restored["labels"].tolist() == [1]
    assert len(DETECTION.to_original_size(said(), View((40, 60), (96, 96)))["boxes"]) == 0


def test_predictions_are_plain_json_with_class_names():
    prediction = said((LEFT, 0.875, 1), (RIGHT, 0.5, 0))
    answer = DETECTION.prediction_to_json(prediction, DATA)
    assert answer == {
        "objects": [
            {"class": "white", "score": 0.875, "box": LEFT},
            {"class": "red", "score": 0.5, "box": RIGHT},
        ]
    }
    assert json.loads(json.dumps(answer)) == answer
    assert DETECTION.prediction_to_json(said(), DATA) == {"objects": []}


def test_coco_results_are_read_by_pycocotools(capsys):
    from pycocotools.coco import COCO

    (result,) = DETECTION.prediction_to_coco(said((LEFT, 0.875, 1)))
    assert result == {"category_id": 2, "bbox": [10.0, 10.0, 20.0, 20.0], "score": 0.875}
    coco = COCO()
    coco.dataset = {"images": [{"id": 1}], "annotations": [], "categories": [{"id": 2}]}
    coco.createIndex()
    assert len(coco.loadRes([result | {"image_id": 1}]).anns) == 1


def test_panels_show_the_truth_and_predictions_above_the_threshold():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    prediction = said((LEFT, 0.9, 0), (RIGHT, 0.1, 1))
    truth, result = DETECTION.panels(image, prediction, true((LEFT, 0, False)), DATA)
    assert truth.scores is None
    assert truth.boxes.tolist() == result.boxes.tolist() == [LEFT]
    assert result.scores.tolist() == pytest.approx([0.9])
    (only,) = DETECTION.panels(image, prediction, None, DATA)
    assert only.caption == "1 found"
