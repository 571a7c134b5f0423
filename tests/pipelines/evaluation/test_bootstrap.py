"""Confidence intervals of metrics, against the binomial distribution, SciPy and hand counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import models
from models.core.errors import TesseraError
from models.core.family import DataSpec, Record
from pipelines.evaluation import bootstrap
from pipelines.evaluation.bootstrap import McNemar

DATA = DataSpec("classification", 1, 8, 8, tuple("abcdefgh"))


def accuracy(right: Sequence[bool]) -> bootstrap.SubsetMetrics:
    values = np.array(right)
    return lambda indices: {"accuracy": float(values[np.array(indices)].mean())}


def test_the_interval_of_a_proportion_agrees_with_the_binomial() -> None:
    right = [True] * 400 + [False] * 100
    drawn = bootstrap.resampled_metrics(accuracy(right), 500, 2000)
    low, high = bootstrap.interval(drawn["accuracy"])
    spread = math.sqrt(0.8 * 0.2 / 500)
    assert low == pytest.approx(0.8 - 1.96 * spread, abs=0.004)
    assert high == pytest.approx(0.8 + 1.96 * spread, abs=0.004)


def test_the_interval_agrees_with_scipy() -> None:
    from scipy import stats

    values = np.random.default_rng(0).exponential(size=200)
    drawn = bootstrap.resampled_metrics(lambda p: {"mean": float(values[p].mean())}, 200, 2000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(1))
    ours = bootstrap.interval(drawn["mean"])
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


def test_halves_without_replacement_give_intervals_of_the_same_width() -> None:
    values = np.random.default_rng(0).normal(size=400)

    def mean(indices: Sequence[int]) -> dict[str, float]:
        return {"mean": float(values[np.array(indices)].mean())}

    widths = []
    for with_replacement in (True, False):
        low, high = bootstrap.interval(
            bootstrap.resampled_metrics(mean, 400, 2000, with_replacement=with_replacement)["mean"]
        )
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    for indices in bootstrap.resample_indices(11, 5, with_replacement=False):
        assert len(set(indices.tolist())) == len(indices) == 5


def test_the_bootstrap_samples_are_reproducible() -> None:
    first, second = (list(bootstrap.resample_indices(50, 3)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second))
    assert not (first[0] == first[1]).all()


def test_a_metric_missing_in_some_bootstrap_samples() -> None:
    def sometimes(indices: Sequence[int]) -> dict[str, float]:
        if 0 not in indices:
            raise TesseraError("nothing to compare")
        return {"a": 1.0, **({"b": 2.0} if 1 in indices else {})}

    drawn = bootstrap.resampled_metrics(sometimes, 4, 200)
    assert 0.4 < np.isfinite(drawn["b"]).mean() < np.isfinite(drawn["a"]).mean() < 1
    result = bootstrap.estimates({"a": 1.0, "never": 0.5}, drawn)
    assert (result["a"].low, result["a"].high) == (1.0, 1.0)
    assert math.isnan(result["never"].low)


def test_models_with_equal_predictions_have_a_difference_of_zero() -> None:
    """Control: each interval alone is wide."""
    right = np.random.default_rng(0).random(200) < 0.8
    worse = right.copy()
    worse[:12] = False
    selectors = [accuracy(right.tolist()), accuracy(worse.tolist())]
    drawn = [bootstrap.resampled_metrics(select, 200, 500) for select in selectors]
    whole = [select(range(200)) for select in selectors]
    same = bootstrap.differences((whole[0], whole[0]), (drawn[0], drawn[0]))["accuracy"]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    lead = bootstrap.differences((whole[0], whole[1]), (drawn[0], drawn[1]))["accuracy"]
    assert lead.value == pytest.approx(whole[0]["accuracy"] - whole[1]["accuracy"])
    assert lead.low > 0
    assert bootstrap.interval(drawn[1]["accuracy"])[1] > bootstrap.interval(drawn[0]["accuracy"])[0]


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(3, 0, 0.25), (0, 0, 1.0), (10, 0, 2 * 0.5**10), (6, 6, 1.0)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p_value: float) -> None:
    both = [True] * 5 + [False] * 3
    first = [True] * only_first + [False] * only_second + both
    second = [False] * only_first + [True] * only_second + both
    result = bootstrap.mcnemar(first, second)
    assert result == McNemar(only_first, only_second, pytest.approx(p_value))


def classified(count: int) -> list[Record]:
    source = torch.Generator().manual_seed(0)
    probabilities = torch.rand(count, 8, generator=source).softmax(1)
    truth = torch.randint(8, (count,), generator=source).tolist()
    return [
        {"probabilities": row, "predicted": int(row.argmax()), "label": label}
        for row, label in zip(probabilities, truth)
    ]


def detected(count: int, *, masks: bool = False) -> list[Record]:
    from models.tasks.instance_segmentation import run_lengths

    source, records = torch.Generator().manual_seed(0), []
    for _ in range(count):
        corner = torch.randint(0, 20, (3, 2), generator=source).float()
        truth = torch.cat([corner, corner + 8], 1)
        moved = truth + torch.randint(-3, 4, (3, 4), generator=source)
        record: Record = {
            "size": (32, 32),
            "boxes": moved,
            "scores": torch.rand(3, generator=source),
            "labels": torch.randint(8, (3,), generator=source),
            "true_boxes": truth,
            "true_labels": torch.randint(8, (3,), generator=source),
            "true_crowd": torch.zeros(3, dtype=torch.bool),
        }
        if masks:
            for side, boxes in (("masks", moved), ("true_masks", truth)):
                pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
                for mask, (left, top, right, bottom) in zip(pixels, boxes.int().tolist()):
                    mask[max(top, 0) : bottom, max(left, 0) : right] = 1
                record[side] = run_lengths(pixels)
        records.append(record)
    return records


@pytest.mark.parametrize(
    ("task", "records"),
    [
        ("cnn", classified(60)),
        ("yolo", detected(20)),
        ("mask_rcnn", detected(12, masks=True)),
    ],
)
def test_metrics_of_a_selection_equal_those_of_its_records(
    task: str, records: list[Record]
) -> None:
    """The fast path has the same result as the records, to the last digit."""
    tested = models.get(task).task
    select = tested.bootstrap_metrics(records, DATA)
    for indices in ([0, 1, 2], list(range(len(records))), [5, 5, 5, 7, 1, 5]):
        own = tested.metrics([records[position] for position in indices], DATA)
        value = select(indices)
        assert {name: value[name] for name in own} == own
    assert select(range(len(records))) == select(range(len(records)))


def test_recall_and_precision_by_class() -> None:
    records = classified(60)
    result = models.get("cnn").task.bootstrap_metrics(records, DATA)(range(60))
    of_b = [record for record in records if record["label"] == 1]
    said_b = [record for record in records if record["predicted"] == 1]
    hits = sum(record["predicted"] == 1 for record in of_b)
    assert result["recall/b"] == hits / len(of_b)
    assert result["precision/b"] == hits / len(said_b)
