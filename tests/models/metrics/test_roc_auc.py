"""The area under the ROC curve beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.metrics.roc_auc import RocAuc


def samples(count: int, classes: int, digits: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores that add up to 1, rounded so that some are equal, and true classes."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(count), truth] += 1
    return (logits.softmax(1) * 10**digits).round() / 10**digits, truth


@pytest.mark.parametrize("digits", [1, 2, 12])
@pytest.mark.parametrize("classes", [2, 5])
def test_it_agrees_with_scikit_learn(classes: int, digits: int) -> None:
    from sklearn.metrics import roc_auc_score

    scores, truth = samples(300, classes, digits, classes)
    auc = RocAuc(scores, truth)
    rng = np.random.default_rng(0)
    for chosen in (np.arange(300), rng.integers(0, 300, 300), rng.permutation(300)[:50]):
        each = [roc_auc_score(truth[chosen] == k, scores[chosen, k]) for k in range(classes)]
        assert auc(chosen) == pytest.approx(np.mean(each), rel=1e-12)
    assert auc(rng.permutation(300)) == auc(range(300))


def test_classes_that_are_missing_or_alone_do_not_count() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0]])
    auc = RocAuc(scores, torch.tensor([0, 1, 1]))
    assert auc(range(3)) == 1
    assert auc([1, 2]) == 0.5
    assert RocAuc(torch.full((4, 2), 0.5), torch.tensor([0, 0, 1, 1]))(range(4)) == 0.5
