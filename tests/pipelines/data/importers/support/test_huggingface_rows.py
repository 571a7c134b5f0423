"""What the rows of a Hugging Face data set say of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data.importers.support.huggingface_rows import RowLabels, read_labels, read_objects


def read(rows: list[dict[str, Any]], names: dict[str, list[str]] | None = None) -> RowLabels:
    return read_labels(Path("train.parquet"), rows, "image", {}, names or {}, "parquet")


def test_class_numbers_have_the_names_that_the_file_knows() -> None:
    rows = [{"image": "a", "label": 1}, {"image": "b", "label": 0}, {"image": "c", "label": None}]
    found = read(rows, {"label": ["cat", "dog"]})
    assert (found.task, found.classes) == ("classification", ("cat", "dog"))
    assert found.labels == (1, 0, None)


def test_numbers_without_names_are_in_their_order() -> None:
    rows = [{"image": str(n), "label": n} for n in (10, 9, 10, 9)]
    assert read(rows).classes == ("9", "10")


@pytest.mark.parametrize(
    "objects",
    [
        {"bbox": [[0, 0, 4, 4], [1, 1, 2, 2]], "categories": [1, 0]},
        [{"bbox": [0, 0, 4, 4], "category": 1}, {"bbox": [1, 1, 2, 2], "category": 0}],
    ],
)
def test_objects_beside_each_other_and_one_by_one_are_the_same(objects: Any) -> None:
    found = read([{"image": "a", "objects": objects}], {"objects": ["cat", "dog"]})
    assert (found.task, found.classes) == ("detection", ("cat", "dog"))
    assert found.objects == (([[0, 0, 4, 4], [1, 1, 2, 2]], (1, 0)),)


def test_a_box_without_a_category_is_refused_with_its_row() -> None:
    rows = [{"image": "a", "objects": {"bbox": [[0, 0, 4, 4]], "categories": []}}]
    with pytest.raises(TesseraError, match="row 1: objects has 1 boxes and 0 categories"):
        read(rows)


def test_boxes_are_left_top_width_and_height(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(file)
    found = read_objects(file.read_bytes(), "a.png", [[1, 2, 3, 4]], [0])
    assert found.boxes.tolist() == [[1, 2, 4, 6]]
    (damage,) = read_objects(file.read_bytes(), "a.png", [[1, 2, 3]], [0]).damaged
    assert damage.message == "a.png: object 0: its bbox is not left, top, width and height"
