"""A confusion matrix is a readable image file of a sensible size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.core.errors import TesseraError
from pipelines.visuals.confusion import confusion_matrix

ODD = ["$x_1^{", "日本語", "a\nb\t\x07c", "", "<b>&amp;</b>", "w" * 200, "\\frac", "#%&"]


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 10, 100, 400])
def test_any_number_of_classes(tmp_path: Path, count: int) -> None:
    path = tmp_path / "made" / "matrix.png"
    matrix = torch.eye(count, dtype=torch.int64) * 50
    confusion_matrix(matrix, [f"class {k}" for k in range(count)], path)
    before = pixels_of(path)
    assert 400 < max(before.shape) < 2500
    if count > 1:
        matrix[0, count - 1] = 1  # one mistake in 51 is seen
        confusion_matrix(matrix, [f"class {k}" for k in range(count)], path)
        assert not np.array_equal(before, pixels_of(path))


def test_rows_are_the_true_classes(tmp_path: Path) -> None:
    confusion_matrix(torch.tensor([[3, 1], [0, 0]]), ["cat", "dog"], tmp_path / "matrix.png")
    height, width, _ = pixels_of(tmp_path / "matrix.png").shape
    dark = pixels_of(tmp_path / "matrix.png").sum(2) < 500
    upper, lower = dark[: height // 2], dark[height // 2 :]
    assert upper.mean() > 3 * lower.mean(), "class dog has no image"
    assert upper[:, : width // 2].mean() > upper[:, width // 2 :].mean(), "most cats are correct"


def test_classes_that_never_occur(tmp_path: Path) -> None:
    confusion_matrix(torch.zeros(3, 3).long(), list("abc"), tmp_path / "matrix.png")
    assert pixels_of(tmp_path / "matrix.png").std() > 1


def test_malicious_class_names_are_drawn_as_text(tmp_path: Path) -> None:
    """No warning is raised; `filterwarnings = error` is on."""
    confusion_matrix(torch.eye(len(ODD)).long(), ODD, tmp_path / "matrix.png")
    assert pixels_of(tmp_path / "matrix.png").std() > 1


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match="for 3 classes"):
        confusion_matrix(torch.zeros(2, 2), list("abc"), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
