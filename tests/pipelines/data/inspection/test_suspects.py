"""Confident learning on probabilities that are made up, and the draft of the corrections."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from models.core.errors import TesseraError
from pipelines.data.images import make_key
from pipelines.data.inspection.suspects import Suspect, find_suspects, write_draft
from pipelines.data.packing.corrections import read_corrections


def made_up(
    flipped: float, classes: int = 5, count: int = 2000, sharpness: float = 6.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of a classifier that is mostly right about the true classes, labels of which a
    share is flipped, and which are."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), truth] += sharpness
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = rng.random(count) < flipped
    labels = np.where(wrong, (truth + rng.integers(1, classes, count)) % classes, truth)
    return probabilities, labels, wrong


def test_flipped_labels_are_found_and_others_are_not() -> None:
    probabilities, labels, wrong = made_up(0.05)
    found = find_suspects(probabilities, labels)
    positions = np.array([one.position for one in found])
    assert wrong[positions].mean() > 0.9
    assert wrong[positions].sum() / wrong.sum() > 0.85
    assert wrong[positions[: wrong.sum() // 2]].all()  # the likeliest first
    # The control: with the true labels there are few.
    probabilities, labels, wrong = made_up(0)
    assert not wrong.any()
    assert len(find_suspects(probabilities, labels)) < 0.01 * len(labels)


def test_the_thresholds_are_those_of_the_paper() -> None:
    """By hand: the mean self-confidence is 0.7 of class 0, and 0.6 of class 1."""
    probabilities = np.array(
        [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8], [0.6, 0.4]]
    )
    labels = np.array([0, 0, 0, 1, 1, 1])
    (only,) = find_suspects(probabilities, labels)
    # Sample 5 looks like class 0, but with 0.6 < 0.7 not confidently so.
    assert (only.position, only.label, round(only.margin, 6)) == (2, 1, 0.2)


def test_a_confident_class_that_is_less_probable_than_the_label_is_no_suspect() -> None:
    """Class 1 has a low threshold, which the first sample reaches."""
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.7, 0.3]])
    labels = np.array([0, 0, 1, 1])
    assert [one.position for one in find_suspects(probabilities, labels)] == []


def test_a_class_without_samples_is_never_suggested() -> None:
    probabilities = np.array([[0.1, 0.1, 0.8], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    assert not find_suspects(probabilities, np.array([0, 0, 1]))


def test_the_margins_fall() -> None:
    probabilities, labels, _ = made_up(0.2)
    margins = [one.margin for one in find_suspects(probabilities, labels)]
    assert margins == sorted(margins, reverse=True)
    assert 0 < margins[-1] < margins[0] <= 1


def test_a_draft_corrects_nothing_and_is_never_replaced(tmp_path: Path) -> None:
    suspects = [
        Suspect("val", make_key("cat/zwei, drei.1"), "cat", 'a "dog"', 0.91),
        Suspect("test", make_key("x" * 200), "dog", "cat", 0.5),
    ]
    file = tmp_path / "corrections.csv"
    write_draft(file, suspects)
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["sample"] for row in rows] == ["cat/zwei, drei.1", suspects[1].key]
    assert rows[0]["suggested"] == 'a "dog"'
    assert {row["action"] for row in rows} == {""}
    with pytest.raises(TesseraError, match="no action in 2 rows"):
        read_corrections(file)
    with pytest.raises(TesseraError, match="exists already"):
        write_draft(file, [])
    text = file.read_text().replace("0.910,", "0.910,drop")
    file.write_text(text)
    (row,) = read_corrections(file).rows
    assert (row.sample, row.split, row.name, row.action) == (
        "cat/zwei, drei.1",
        "val",
        "cat",
        "drop",
    )
