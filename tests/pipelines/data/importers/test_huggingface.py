"""metadata.jsonl: what each line says of an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layouts.base import json_lines, picture

from models.core.errors import TesseraError, UsageError
from pipelines.data.importers import huggingface
from pipelines.data.sources import AmbiguousError


def made(folder: Path, rows: list[dict[str, Any]], count: int = 4) -> Path:
    for number in range(count):
        picture(folder / f"{number}.jpg", number)
    json_lines(folder / "metadata.jsonl", rows)
    return folder


def test_lines_are_matched_to_images(tmp_path: Path) -> None:
    names = ["0.jpg", "./1.jpg", "2", "9.jpg"]
    rows = [{"file_name": name, "label": label} for name, label in zip(names, [0, 10, None, 2])]
    source = huggingface.read(str(made(tmp_path, rows)), {})
    assert source.classes == ("0", "2", "10")
    assert [(i.origin, i.label, i.problem and i.problem[0]) for i in source.items] == [
        ("0.jpg", 0, None),
        ("1.jpg", 2, None),
        ("2.jpg", None, "missing label"),
        ("9.jpg", 1, "missing image"),
    ]
    assert source.shared_files == (tmp_path / "metadata.jsonl",)


def test_the_column_can_be_given(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.jpg", "a": "xy"[n % 2], "b": "pq"[n // 2]} for n in range(4)]
    folder = str(made(tmp_path, rows))
    with pytest.raises(UsageError, match="labels in one of several: a, b"):
        huggingface.read(folder, {})
    assert huggingface.read(folder, {"label_column": "b"}).classes == ("p", "q")
    with pytest.raises(UsageError, match="has no column c"):
        huggingface.read(folder, {"label_column": "c"})


def test_objects_become_boxes_with_their_classes(tmp_path: Path) -> None:
    boxes = [[1, 2, 5, 6], [0, 0, 24, 16]]
    objects = {"bbox": boxes, "categories": ["b", "a"]}
    rows = [{"file_name": f"{n}.jpg", "objects": objects if n else None} for n in range(4)]
    source = huggingface.read(str(made(tmp_path, rows)), {})
    assert (source.task, source.classes) == ("detection", ("a", "b"))
    assert source.annotate is not None
    found = source.annotate(source.items[1])
    assert found.boxes.tolist() == [[1, 2, 6, 8], [0, 0, 24, 16]]
    assert found.labels.tolist() == [1, 0]
    assert len(source.annotate(source.items[0]).boxes) == 0
    # The same as a list of objects.
    listed = [{"bbox": box, "category": name} for box, name in zip(boxes, "ba")]
    rows = [{"file_name": f"{n}.jpg", "objects": listed if n else []} for n in range(4)]
    again = huggingface.read(str(made(tmp_path, rows)), {})
    assert again.annotate is not None
    assert again.annotate(again.items[1]).boxes.tolist() == found.boxes.tolist()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 can't be read"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"label": 1}', "line 2 has no file_name"),
        (
            '{"file_name": "1.jpg", "objects": {"bbox": [[1, 1, 2, 2]], "categories": []}}',
            "1 boxes",
        ),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    first = {"file_name": "0.jpg", "objects": {"bbox": [[1, 1, 2, 2]], "categories": [1]}}
    folder = made(tmp_path, [])
    (folder / "metadata.jsonl").write_text(f"{json.dumps(first)}\n{line}\n")
    with pytest.raises(TesseraError, match=message):
        huggingface.read(str(folder), {})


def test_a_column_of_splits_is_used(tmp_path: Path) -> None:
    words = ["train", "validation", "", "extra"]
    rows = [{"file_name": f"{n}.jpg", "label": n % 2, "split": words[n]} for n in range(4)]
    items = huggingface.read(str(made(tmp_path, rows)), {}).items
    assert [item.split for item in items] == ["train", "val", None, None]
    assert [item.problem and item.problem[0] for item in items] == [None] * 3 + ["unknown split"]
    folds = [{**row, "split": n} for n, row in enumerate(rows)]  # the control: other numbers
    items = huggingface.read(str(made(tmp_path, folds)), {}).items
    assert {(item.split, item.problem) for item in items} == {(None, None)}
    box = {"bbox": [[1, 2, 5, 6]], "categories": [0]}
    rows = [{"file_name": f"{n}.jpg", "objects": box, "split": words[n]} for n in range(3)]
    items = huggingface.read(str(made(tmp_path, rows)), {}).items
    assert [item.split for item in items] == ["train", "val", None]


def test_an_image_with_two_labels_is_rejected(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n % 4}.jpg", "label": "ab"[n % 2]} for n in range(5)]
    source = huggingface.read(str(made(tmp_path, rows)), {})
    assert not any(item.problem for item in source.items)  # the control: the same label
    rows[4]["label"] = "b"
    items = huggingface.read(str(made(tmp_path, rows)), {}).items
    assert [item.row for item in items if item.problem] == [0, 4]
    assert {item.problem[0] for item in items if item.problem} == {"several labels"}


@pytest.mark.parametrize(
    ("more", "of_object", "words"),
    [
        ({"label": "day"}, {}, "classes of the images in label"),
        ({}, {"segmentation": [[[1, 2, 6, 2, 6, 8]]]}, "segmentation in objects"),
        ({}, {"keypoints": [[3, 3, 2]]}, "keypoints in objects"),
    ],
)
def test_what_boxes_leave_out_is_asked_about(
    tmp_path: Path, more: dict[str, Any], of_object: dict[str, Any], words: str
) -> None:
    box = {"bbox": [[1, 2, 5, 6]], "categories": ["a"]}
    rows = [{"file_name": f"{n}.jpg", "objects": {**box, **of_object}, **more} for n in range(4)]
    folder = str(made(tmp_path, rows))
    with pytest.raises(AmbiguousError, match=f"and also {words}") as caught:
        huggingface.read(folder, {})
    tasks = [huggingface.read(folder, reading.options).task for reading in caught.value.readings]
    assert tasks == ["detection", *["classification"] * bool(more)]
    rows = [{"file_name": f"{n}.jpg", "objects": box, "label": None} for n in range(4)]
    assert huggingface.read(str(made(tmp_path, rows)), {}).task == "detection"  # the control
