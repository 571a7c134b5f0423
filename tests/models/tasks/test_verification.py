"""Metrics against scikit-learn and against brute force over all pairs."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.core.errors import TesseraError, UsageError
from models.core.family import BatchRng, DataSpec
from models.tasks import verification
from models.tasks.classification import CLASSIFICATION, ClassificationAugment
from models.tasks.verification import VERIFICATION, VerificationAugment

CLASSES = tuple(f"class {k}" for k in range(5))
SPEC = DataSpec("classification", 1, 8, 8, CLASSES, (0.5,), (0.2,))


def compared(embeddings: torch.Tensor, labels: torch.Tensor) -> list[dict]:
    return [
        VERIFICATION.make_record({"embedding": row.clone()}, {"label": label}, SPEC)
        for row, label in zip(F.normalize(embeddings), labels.tolist())
    ]


def scattered(count: int = 300, classes: int = 5, spread: float = 0.5, seed: int = 0):
    """Embeddings around a direction for each class; the classes overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, 16, generator=generator)
    rows = spread * centres[labels] + torch.randn(count, 16, generator=generator)
    return compared(rows, labels)


def all_pairs(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(similarity, whether of the same class) of every pair, one after the other."""
    result = [
        (float(a["embedding"].double() @ b["embedding"].double()), a["label"] == b["label"])
        for a, b in itertools.combinations(records, 2)
    ]
    return np.array([s for s, _ in result]), np.array([same for _, same in result])


@pytest.mark.parametrize("spread", [0.4, 0.7, 1.2])
def test_rates_agree_with_scikit_learn(spread):
    from scipy.optimize import brentq
    from sklearn.metrics import roc_curve

    records = scattered(spread=spread)
    similarity, same = all_pairs(records)
    far, tar, _ = roc_curve(same, similarity, drop_intermediate=False)
    metrics = VERIFICATION.metrics(records, SPEC)
    eer = brentq(lambda x: 1 - x - np.interp(x, far, tar), 0, 1)
    assert metrics["eer"] == pytest.approx(eer, abs=1e-3)
    assert 0.01 < eer < 0.45
    accepted = similarity >= metrics["threshold"]
    assert accepted[~same].mean() == pytest.approx(eer, abs=1e-3)
    assert 1 - accepted[same].mean() == pytest.approx(eer, abs=2e-3)
    for name, rate in (("tar_far_1e2", 1e-2), ("tar_far_1e3", 1e-3)):
        assert metrics[name] == pytest.approx(tar[far <= rate].max(), abs=3e-3), name


def test_recall_agrees_with_brute_force():
    records = scattered(count=120, spread=0.4)
    embeddings = torch.stack([r["embedding"] for r in records]).double()
    labels = torch.tensor([r["label"] for r in records])
    likeness = (embeddings @ embeddings.T).fill_diagonal_(-2)
    expected = (labels[likeness.argmax(1)] == labels).double().mean()
    recall = VERIFICATION.metrics(records, SPEC)["recall_at_1"]
    assert recall == pytest.approx(float(expected), abs=1e-12)
    assert 0.3 < recall < 0.95


def test_few_shot_agrees_with_brute_force():
    """With other random draws: the mean over many is the same."""
    records = scattered(count=100, spread=0.7)
    embeddings = torch.stack([r["embedding"] for r in records]).double()
    labels = [r["label"] for r in records]
    draw = random.Random(7)
    rates = []
    for _ in range(200):
        support = {
            k: draw.sample([i for i, label in enumerate(labels) if label == k], 5) for k in range(5)
        }
        prototypes = F.normalize(torch.stack([embeddings[support[k]].mean(0) for k in range(5)]))
        queries = [i for i in range(100) if i not in {j for s in support.values() for j in s}]
        output = (embeddings[queries] @ prototypes.T).argmax(1).tolist()
        rates.append(np.mean([s == labels[i] for s, i in zip(output, queries)]))
    metric = VERIFICATION.metrics(records, SPEC)["few_shot_5"]
    assert metric == pytest.approx(np.mean(rates), abs=4 * np.std(rates) / np.sqrt(100))
    assert 0.4 < metric < 0.95


@pytest.mark.slow
def test_metrics_do_not_depend_on_order_threads_or_blocks(monkeypatch):
    records = scattered(count=120)
    metrics = VERIFICATION.metrics(records, SPEC)
    shuffled = random.Random(1).sample(records, len(records))
    assert VERIFICATION.metrics(shuffled, SPEC) == metrics
    torch.set_num_threads(2)  # the folder's fixture sets it back
    monkeypatch.setattr(verification, "_BLOCK", 50 * len(records))
    assert VERIFICATION.metrics(shuffled, SPEC) == metrics
    assert VERIFICATION.metrics(records[1:], SPEC) != metrics


def test_metrics_of_well_separated_classes():
    """The threshold is in the middle of the gap."""
    labels = torch.arange(40) % 4
    metrics = VERIFICATION.metrics(compared(torch.eye(4)[labels], labels), SPEC)
    best = {"tar_far_1e2": 1, "tar_far_1e3": 1, "recall_at_1": 1, "few_shot_5": 1, "eer": 0}
    assert {name: metrics[name] for name in best} == best
    assert metrics["threshold"] == pytest.approx(0.5, abs=1e-3)


def test_metrics_of_identical_embeddings():
    labels = torch.arange(40) % 4
    metrics = VERIFICATION.metrics(compared(torch.ones(40, 3), labels), SPEC)
    assert metrics["eer"] == 0.5
    assert all(metrics[name] == 0 for name in ("tar_far_1e2", "recall_at_1", "few_shot_5"))


def test_pairs_of_opposite_embeddings_are_included():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    metrics = VERIFICATION.metrics(compared(rows, torch.tensor([0, 0, 1, 1])), SPEC)
    assert (metrics["eer"], metrics["recall_at_1"]) == (0, 1)
    assert "few_shot_5" not in metrics


def test_few_shot_needs_enough_images():
    """A class with a single image is only a negative for others; classes of up to 5 are never
    drawn."""
    labels = torch.tensor([0] * 8 + [1] * 7 + [2] * 5 + [3])
    records = compared(torch.eye(4)[labels] + 0.01 * torch.arange(21.0)[:, None].sin(), labels)
    metrics = VERIFICATION.metrics(records, SPEC)
    assert metrics["recall_at_1"] == 1
    assert metrics["few_shot_5"] == 1
    assert "few_shot_5" not in VERIFICATION.metrics(records[8:], SPEC)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 0, 0], "no two of different classes"), ([0, 1, 2], "no two of one class")],
)
def test_a_split_without_pairs_is_refused(labels, message):
    records = compared(torch.eye(3), torch.tensor(labels))
    with pytest.raises(TesseraError, match=message):
        VERIFICATION.metrics(records, SPEC)


def test_embeddings_that_are_not_finite_are_refused():
    records = compared(torch.eye(3), torch.tensor([0, 0, 1]))
    records[1]["embedding"] = torch.tensor([float("nan"), 0.0, 0.0])
    with pytest.raises(TesseraError, match="not finite"):
        VERIFICATION.metrics(records, SPEC)
    with pytest.raises(TesseraError, match="no predictions"):
        VERIFICATION.metrics([], SPEC)


@pytest.mark.slow
def test_ten_thousand_images_are_evaluated_in_seconds():
    records = scattered(count=10_000)
    started = time.process_time()
    VERIFICATION.metrics(records, SPEC)
    assert time.process_time() - started < 10


def test_related_images_are_the_most_similar():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.96, 0.28]])
    records = compared(rows, torch.tensor([0, 1, 2, 9]))
    assert VERIFICATION.related_images(records, 0) == [
        (3, "0.96 class 9"),
        (2, "0.80 class 2"),
        (1, "0.00 class 1"),
    ]
    many = scattered(count=50)
    related = VERIFICATION.related_images(many, 7)
    assert len(related) == verification.NEIGHBOURS
    assert 7 not in [position for position, _ in related]


def test_json_and_captions():
    prediction = {"embedding": torch.tensor([0.6, 0.8])}
    assert VERIFICATION.prediction_to_json(prediction, SPEC) == {
        "embedding": [pytest.approx(0.6), pytest.approx(0.8)]
    }
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    captions = [
        VERIFICATION.panels(image, prediction, truth, SPEC)[0].caption
        for truth in (None, {"label": 1}, {"label": 12})
    ]
    assert captions == ["", "class 1", "class 12"]


def test_images_are_augmented_as_for_classification():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 1, 8, 8), generator=generator, dtype=torch.uint8)
    batch = {"image": images, "label": torch.arange(16) % 5, "key": [""] * 16}
    settings = {"flip": True, "crop_padding": 2, "cutout": 3}
    one, other = (
        task.augment(kind(**settings), SPEC, train=True)(batch, BatchRng(3, 16, slice(0, 16)))
        for task, kind in (
            (VERIFICATION, VerificationAugment),
            (CLASSIFICATION, ClassificationAugment),
        )
    )
    assert torch.equal(one["image"], other["image"])
    with pytest.raises(UsageError, match=r"augment\.cutout = -1"):
        VerificationAugment(cutout=-1)


def warped(image: torch.Tensor, **settings) -> torch.Tensor:
    """300 random augmentations of one image (1, H, W), not normalised."""
    plain = DataSpec("classification", 1, *image.shape[1:], CLASSES, (0.0,), (1.0,))
    batch = {"image": image.repeat(300, 1, 1, 1), "label": torch.zeros(300), "key": [""] * 300}
    transform = VERIFICATION.augment(VerificationAugment(**settings), plain, train=True)
    return transform(batch, BatchRng(0, 300, slice(0, 300)))["image"][:, 0]


def moments(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The variances of the bright pixels in rows and columns, and their covariance, for each
    image."""
    rows, columns = (torch.arange(side) - (side - 1) / 2 for side in images.shape[1:])
    weights = images / images.sum((1, 2), keepdim=True)
    return (
        (weights * rows[:, None] ** 2).sum((1, 2)),
        (weights * columns**2).sum((1, 2)),
        (weights * rows[:, None] * columns).sum((1, 2)),
    )


def test_rotation_shear_and_zoom_are_as_large_as_set():
    """With a bright bar, twice as far from the left and right edges as the image is high."""
    image = torch.zeros(1, 41, 81, dtype=torch.uint8)
    image[:, 19:22, 30:51] = 255
    _, long, _ = moments(image[0][None].float())

    def angles(**settings) -> torch.Tensor:
        rows, columns, both = moments(warped(image, **settings))
        return torch.rad2deg(torch.atan2(2 * both, columns - rows) / 2)

    turned = angles(rotate=30.0)
    assert 27 < turned.max() <= 31
    assert -31 <= turned.min() < -27
    assert angles(shear=0.3).abs().max() < 2, "rows slide over each other, and the bar is a row"
    upright = image.transpose(1, 2).contiguous()
    slanted = torch.tan(torch.deg2rad(90 - _steepness(warped(upright, shear=0.3))))
    assert 0.25 < slanted.abs().max() <= 0.32
    _, columns, _ = moments(warped(image, zoom=0.25))
    sides = (columns / long).sqrt()
    assert 1.2 < sides.max() <= 1.26
    assert 0.79 <= sides.min() < 0.84


def _steepness(images: torch.Tensor) -> torch.Tensor:
    """The angle of the bar in each image against the rows, in degrees from 0 to 180."""
    rows, columns, both = moments(images)
    return torch.rad2deg(torch.atan2(2 * both, columns - rows) / 2) % 180


def test_augmentation_does_not_depend_on_the_ranks():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    batch = {"image": images, "label": torch.arange(12) % 5}
    settings = VerificationAugment(crop_padding=1, rotate=20.0, shear=0.2, zoom=0.2)
    transform = VERIFICATION.augment(settings, SPEC, train=True)
    whole = transform(batch, BatchRng(3, 12, slice(0, 12)))["image"]
    for rows in (slice(0, 5), slice(5, 12)):
        part = {name: value[rows] for name, value in batch.items()}
        assert torch.equal(transform(part, BatchRng(3, 12, rows))["image"], whole[rows])
    still = VERIFICATION.augment(settings, SPEC, train=False)(batch, BatchRng(3, 12, slice(0, 12)))
    torch.testing.assert_close(still["image"], (images / 255 - 0.5) / 0.2)


@pytest.mark.parametrize("settings", [{"rotate": 200.0}, {"shear": -0.1}, {"zoom": 0.6}])
def test_invalid_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(UsageError, match=rf"augment\.{name} = "):
        VerificationAugment(**settings)
