"""The Fréchet distance against references, and the predictions for generated images."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from models.core.errors import TesseraError
from models.core.family import BatchRng, DataSpec
from models.tasks.generation import GENERATION, GenerationAugment, frechet_distance

DATA = DataSpec("images", 1, 4, 6, (), (0.2,), (0.5,))


def features(count: int, size: int, seed: int) -> torch.Tensor:
    """Correlated, with different means and deviations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) / math.sqrt(size)
    shift = torch.randn(size, generator=generator)
    return torch.randn(count, size, generator=generator) @ mix + shift


def by_scipy(fake: torch.Tensor, real: torch.Tensor) -> float:
    """As in the reference implementation of Heusel et al."""
    import scipy.linalg

    a, b = (np.asarray(x, dtype=np.float64) for x in (fake, real))
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False))
    apart = a.mean(0) - b.mean(0)
    return float(apart @ apart + traces - 2 * np.trace(root.real))


@pytest.mark.parametrize(("fake", "real", "size"), [(200, 200, 16), (500, 300, 64), (40, 900, 3)])
def test_the_distance_agrees_with_scipy(fake, real, size):
    one, other = features(fake, size, 0), features(real, size, 1)
    assert frechet_distance(one, other) == pytest.approx(by_scipy(one, other), rel=1e-9)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-12)


def test_the_distance_in_one_dimension_follows_the_formula():
    one, other = torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0], [14.0], [12.0]])
    expected = (2 - 12) ** 2 + (math.sqrt(2) - 2) ** 2
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)


def test_the_distance_of_a_set_to_itself_is_zero():
    values = features(100, 32, 0)
    assert 0 <= frechet_distance(values, values) < 1e-9
    assert 0 <= frechet_distance(values, values.flip(0)) < 1e-9
    few = features(5, 32, 0)
    assert 0 <= frechet_distance(few, few.flip(0)) < 1e-9


def test_the_distance_of_fewer_images_than_features():
    """The covariances are singular: compared with the roots of the eigenvalues of A^½ B A^½."""
    fake, real = features(7, 40, 0).double(), features(9, 40, 1).double()
    a, b = torch.cov(fake.T), torch.cov(real.T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    apart = (fake.mean(0) - real.mean(0)).square().sum()
    expected = float(apart + a.trace() + b.trace() - 2 * shared)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-5)


def test_the_distance_of_one_image_and_of_identical_images():
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])
    assert frechet_distance(one, other) == 25
    assert frechet_distance(one.expand(8, -1), other.expand(3, -1)) == 25


def record(predicted: int, confidence: float = 0.9, seed: int = 0) -> dict:
    fake, real = features(1, 4, seed)[0], features(1, 4, seed + 1000)[0]
    return {
        "fake": fake,
        "real": real,
        "predicted": predicted,
        "classes": 4,
        "confidence": confidence,
    }


def test_class_shares_and_entropy():
    saids = [0, 0, 0, 1, 1, 1, 1, 3]
    result = GENERATION.metrics([record(s, s / 4, i) for i, s in enumerate(saids)], DATA)
    assert result["class_share_min"] == 0
    assert result["class_share_max"] == 4 / 8
    shares = np.array([3, 4, 1]) / 8
    assert result["class_entropy"] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(4))
    assert result["confidence"] == (4 * 0.25 + 0.75) / 8
    even = GENERATION.metrics([record(i % 4, seed=i) for i in range(8)], DATA)
    assert even["class_share_min"] == even["class_share_max"] == 0.25
    assert even["class_entropy"] == 1


def test_entropy_of_a_judge_with_one_class():
    result = GENERATION.metrics([record(2, seed=i) for i in range(3)], DATA)
    assert result["class_share_max"] == 1
    assert result["class_entropy"] == 0
    sole = GENERATION.metrics([{**record(0), "classes": 1}], DATA)
    assert all(math.isfinite(value) for value in sole.values())
    with pytest.raises(TesseraError, match="no images"):
        GENERATION.metrics([], DATA)


def judge(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features are the sums of rows; certain of class 0 for dark images, of class 2 for bright
    ones."""
    assert images.dtype == torch.uint8
    bright = images.float().mean((1, 2, 3)) / 255
    probabilities = torch.stack([1 - bright, torch.zeros_like(bright), bright], 1)
    return images.float().sum((1, 3)), probabilities


def test_the_judge_sees_fake_and_real_images():
    fake = [torch.full((1, 4, 6), value, dtype=torch.uint8) for value in (0, 255)]
    real = torch.full((2, 1, 4, 6), 3, dtype=torch.uint8)
    predictions, targets = [{"image": image} for image in fake], GENERATION.targets({"image": real})
    GENERATION.apply_judge(judge, predictions, targets)
    records = [GENERATION.make_record(p, t, DATA) for p, t in zip(predictions, targets)]
    assert [r["predicted"] for r in records] == [0, 2]
    assert [r["classes"] for r in records] == [3, 3]
    assert [r["fake"].tolist() for r in records] == [[0.0] * 4, [255.0 * 6] * 4]
    assert all(r["real"].tolist() == [18.0] * 4 for r in records)
    assert len(pickle.dumps(records[0]["fake"])) < 1000, "a view carries its batch"
    assert [GENERATION.error_score(r) for r in records] == [0, 0]


def test_without_a_judge_the_error_names_the_setting():
    image = torch.zeros(1, 4, 6, dtype=torch.uint8)
    with pytest.raises(TesseraError, match=r"not judged.*judge=models:/"):
        GENERATION.make_record({"image": image}, {"image": image}, DATA)


def test_panels_show_only_the_fake_image():
    real, fake = (torch.full((1, 4, 6), v, dtype=torch.uint8) for v in (1, 2))
    prediction = {"image": fake, "predicted": 7, "confidence": 0.987}
    (panel,) = GENERATION.panels(real, prediction, {"image": real}, DATA)
    assert panel.image is fake
    assert panel.caption == "class 7, 99%"
    (panel,) = GENERATION.panels(real, None, {"image": real}, DATA)
    assert panel.image is real
    assert GENERATION.prediction_to_image(prediction) is fake
    assert GENERATION.prediction_to_json(prediction, DATA) == {"height": 4, "width": 6}


def test_half_of_the_images_are_mirrored_in_training_only():
    images = torch.arange(24, dtype=torch.uint8).reshape(1, 1, 4, 6).repeat(200, 1, 1, 1)
    batch = {"image": images}
    plain = (images.float() / 255 - 0.2) / 0.5
    for settings, train in ((GenerationAugment(), True), (GenerationAugment(flip=True), False)):
        kept = GENERATION.augment(settings, DATA, train=train)(
            batch, BatchRng(0, 200, slice(0, 200))
        )
        torch.testing.assert_close(kept["image"], plain)
    flip = GENERATION.augment(GenerationAugment(flip=True), DATA, train=True)
    result = flip(batch, BatchRng(0, 200, slice(0, 200)))["image"]
    mirrored = torch.tensor([torch.allclose(f, p.flip(-1)) for f, p in zip(result, plain)])
    assert 60 < int(mirrored.sum()) < 140
    torch.testing.assert_close(result[~mirrored], plain[~mirrored])
    cut = flip({"image": images[50:80]}, BatchRng(0, 200, slice(50, 80)))["image"]
    torch.testing.assert_close(cut, result[50:80])
