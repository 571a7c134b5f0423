"""Metrics against scikit-learn; augmentation against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.core.errors import TesseraError, UsageError
from models.core.family import BatchRng, DataSpec
from models.tasks.classification import CLASSIFICATION, ClassificationAugment

CLASSES = tuple(f"class {k}" for k in range(8))
SPEC = DataSpec("classification", 3, 12, 10, CLASSES, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def answers(count: int = 400, classes: int = 8, seed: int = 0, absent: int | None = 6):
    """Predictions better than chance, and labels without the class `absent`."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (count,), generator=generator)
    if absent is not None:
        truth[truth == absent] = 0
    logits = torch.randn(count, classes, generator=generator) + 1.5 * F.one_hot(truth, classes)
    if absent is not None:
        logits[:, absent] -= 20
    probabilities = logits.softmax(1)
    predictions = [{"probabilities": row, "label": int(row.argmax())} for row in probabilities]
    return compared(predictions, [{"label": int(t)} for t in truth]), probabilities, truth


def compared(predictions, targets):
    return [CLASSIFICATION.make_record(p, t, SPEC) for p, t in zip(predictions, targets)]


def rows(count: int, total: int | None = None, start: int = 0, seed: int = 5) -> BatchRng:
    return BatchRng(seed, total or count, slice(start, start + count))


def pictures(count: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *SPEC.shape), generator=generator, dtype=torch.uint8)
    return {
        "image": images,
        "label": torch.arange(count) % 8,
        "key": [str(i) for i in range(count)],
    }


@pytest.mark.parametrize("absent", [6, None])
def test_metrics_agree_with_scikit_learn(absent):
    from sklearn import metrics as sklearn_metrics

    records, probabilities, truth = answers(absent=absent)
    output = probabilities.argmax(1).numpy()
    metrics = CLASSIFICATION.metrics(records, SPEC)
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        truth, output, average="macro", zero_division=0
    )
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(truth, output),
        "loss": float(F.nll_loss(probabilities.double().log(), truth)),
        "top5": sklearn_metrics.top_k_accuracy_score(truth, probabilities, k=5, labels=range(8)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "kappa": sklearn_metrics.cohen_kappa_score(truth, output),
        "balanced_accuracy": sklearn_metrics.recall_score(
            truth, output, average="macro", labels=sorted(set(truth.tolist()))
        ),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-12), name
    matrix = CLASSIFICATION.confusion(records, SPEC)
    assert matrix.dtype == torch.int64
    expected_matrix = sklearn_metrics.confusion_matrix(truth, output, labels=range(8))
    assert torch.equal(matrix, torch.from_numpy(expected_matrix))


def test_calibration_error_agrees_with_scikit_learn():
    from sklearn.calibration import calibration_curve

    records, probabilities, truth = answers(absent=None)
    confidence, output = (t.numpy() for t in probabilities.max(1))
    right, sure = calibration_curve(output == truth.numpy(), confidence, n_bins=15)
    counts, _ = np.histogram(confidence, bins=15, range=(0, 1))
    expected = np.average(np.abs(right - sure), weights=counts[counts > 0])
    metrics = CLASSIFICATION.metrics(records, SPEC)
    assert metrics["calibration_error"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["calibration_error"] > 0.02


def test_metrics_do_not_depend_on_order_or_threads():
    records, *_ = answers()
    metrics = CLASSIFICATION.metrics(records, SPEC)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = [records[i] for i in order]
    torch.set_num_threads(2)  # the folder's fixture sets it back
    assert CLASSIFICATION.metrics(shuffled, SPEC) == metrics


def test_top5_needs_more_than_five_classes():
    few = DataSpec("classification", 1, 8, 8, ("a", "b", "c"))
    records, *_ = answers(classes=3, absent=None)
    assert "top5" not in CLASSIFICATION.metrics(records, few)


def test_a_probability_of_zero_has_a_finite_loss():
    prediction = {"probabilities": torch.tensor([1.0, 0.0]), "label": 0}
    right, wrong = compared([prediction, prediction], [{"label": 0}, {"label": 1}])
    assert CLASSIFICATION.error_score(right) == 0
    assert 87 < CLASSIFICATION.error_score(wrong) < 88


def test_labels_out_of_range_are_refused():
    few = DataSpec("classification", 1, 8, 8, ("a", "b", "c"))
    good = {"probabilities": torch.tensor([1.0, 0.0, 0.0]), "label": 0}
    with pytest.raises(TesseraError, match="a target has class 7, but there are 3 classes"):
        CLASSIFICATION.make_record(good, {"label": 7}, few)
    with pytest.raises(TesseraError, match="a prediction has class 3"):
        CLASSIFICATION.make_record({**good, "label": 3}, {"label": 0}, few)
    with pytest.raises(TesseraError, match="no predictions"):
        CLASSIFICATION.metrics([], few)


def test_json_and_captions_have_class_names():
    prediction = {"probabilities": torch.tensor([0.1, 0.6, 0.3]), "label": 1}
    spec = DataSpec("classification", 1, 8, 8, ("cat", "dog", "owl"))
    answer = CLASSIFICATION.prediction_to_json(prediction, spec)
    assert answer["class"] == "dog"
    assert answer["probability"] == pytest.approx(0.6)
    assert [a["class"] for a in answer["top5"]] == ["dog", "owl", "cat"]
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)

    def caption(said, truth):
        (panel,) = CLASSIFICATION.panels(image, said, truth, spec)
        return panel.caption

    assert caption(prediction, None) == "dog 60%"
    assert caption(prediction, {"label": 1}) == "dog 60%"
    assert caption(prediction, {"label": 2}) == "dog 60%, is owl"
    assert caption(None, {"label": 2}) == "owl"


def test_without_augmentation_images_are_only_normalised():
    batch = pictures(4)
    mean, std = (torch.tensor(v)[:, None, None] for v in (SPEC.mean, SPEC.std))
    expected = (batch["image"].float() / 255 - mean) / std
    settings = ClassificationAugment(flip=True, crop_padding=3, cutout=4, label_smoothing=0.1)
    for transform in (
        CLASSIFICATION.augment(settings, SPEC, train=False),
        CLASSIFICATION.augment(ClassificationAugment(), SPEC, train=True),
    ):
        seen = transform(batch, rows(4))
        torch.testing.assert_close(seen["image"], expected)
        assert "target" not in seen
        assert batch["image"].dtype == torch.uint8


def test_shift_and_mirror_return_crops_of_the_reflected_image():
    """Each result is a crop of the reflection-padded image or of its mirror image."""
    plain = DataSpec("classification", 3, 12, 10, CLASSES, (0.0,), (1.0,))
    batch = pictures(64)
    settings = ClassificationAugment(flip=True, crop_padding=2)
    seen = CLASSIFICATION.augment(settings, plain, train=True)(batch, rows(64))["image"]
    shifts, mirrored = set(), 0
    for image, result in zip(batch["image"].float() / 255, seen):
        detected = []
        for flipped in (False, True):
            padded = F.pad((image.flip(-1) if flipped else image)[None], (2, 2, 2, 2), "reflect")[0]
            for top, left in itertools.product(range(5), range(5)):
                if torch.allclose(padded[:, top : top + 12, left : left + 10], result):
                    detected.append((flipped, top, left))
        assert len(detected) == 1
        mirrored += detected[0][0]
        shifts.add(detected[0][1:])
    assert 16 < mirrored < 48
    assert len(shifts) > 15


def test_augmentation_does_not_depend_on_the_ranks():
    batch = pictures(12)
    settings = ClassificationAugment(flip=True, crop_padding=2, cutout=4, label_smoothing=0.1)
    transform = CLASSIFICATION.augment(settings, SPEC, train=True)
    whole = transform(batch, rows(12))
    for start, count in ((0, 5), (5, 4), (9, 3)):
        part = {name: value[start : start + count] for name, value in batch.items()}
        mine = transform(part, rows(count, total=12, start=start))
        assert torch.equal(mine["image"], whole["image"][start : start + count])
        assert torch.equal(mine["target"], whole["target"][start : start + count])
    again = transform(batch, rows(12, seed=6))
    assert not torch.equal(again["image"], whole["image"])


def test_cutout_sets_a_square_to_the_mean():
    batch = pictures(200)
    batch["image"] = torch.full_like(batch["image"], 255)
    seen = CLASSIFICATION.augment(ClassificationAugment(cutout=4), SPEC, train=True)(
        batch, rows(200)
    )["image"]
    blank = (seen == 0).all(1).flatten(1).sum(1)
    assert int(blank.max()) == 16
    assert int(blank.min()) >= 4  # a corner of it is always inside
    assert len(set(blank.tolist())) > 2


def test_smoothed_targets_sum_to_one():
    settings = ClassificationAugment(label_smoothing=0.2)
    target = CLASSIFICATION.augment(settings, SPEC, train=True)(pictures(8), rows(8))["target"]
    assert torch.allclose(target.sum(1), torch.ones(8))
    assert torch.allclose(target.diagonal(), torch.full((8,), 0.8 + 0.2 / 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_padding": -1}, "crop_padding = -1"),
        ({"cutout": -2}, "cutout = -2"),
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        ClassificationAugment(**settings)


def test_padding_larger_than_the_image_is_refused():
    with pytest.raises(UsageError, match="give at most 9"):
        CLASSIFICATION.augment(ClassificationAugment(crop_padding=10), SPEC, train=True)
