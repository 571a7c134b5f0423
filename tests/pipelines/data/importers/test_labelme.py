"""labelme: polygons, rectangles and circles; groups; images by their path or by the JSON's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layouts.base import picture, text
from layouts.box_files import HEIGHT, WIDTH, box, corners, labelme_json
from layouts.box_sets import COUNT, each, images

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects, check
from pipelines.data.importers import labelme
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import AmbiguousError, Source


def write(folder: Path, shapes: list[dict[str, Any]], **fields: Any) -> Source:
    """One image and its JSON file."""
    picture(folder / "a.jpg", width=WIDTH, height=HEIGHT)
    content = {**json.loads(labelme_json(0)), "imagePath": "a.jpg", "shapes": shapes, **fields}
    text(folder / "a.json", json.dumps(content))
    return labelme.read(str(folder), {})


def annotated(source: Source, row: int = 0) -> Objects:
    assert source.annotate is not None
    found = source.annotate(source.items[row])
    assert isinstance(found, Objects)
    check(found, height=HEIGHT, width=WIDTH, classes=len(source.classes), where="x")
    return found


def shape(kind: str, points: Any, label: Any = "cat", **fields: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, **fields}


def test_polygons_are_read_with_the_boxes_around_them(tmp_path: Path) -> None:
    each("{}.jpg", "{}.json", labelme_json, tmp_path)
    assert labelme.recognises(str(tmp_path)) == "shapes in 0.json"
    source = labelme.read(str(tmp_path), {})
    assert (source.task, source.classes) == ("instance_segmentation", ("blue", "red"))
    for row in range(COUNT):
        left, top, width, height = box(row)
        found = annotated(source, row)
        assert found.boxes.tolist() == [[left, top, left + width, top + height]]
        assert [path.name for path in source.files(source.items[row])] == [
            f"{row}.jpg",
            f"{row}.json",
        ]


@pytest.mark.parametrize("points", [[[2, 3], [9, 8]], [[9, 8], [2, 3]], corners(0)])
def test_a_rectangle_has_two_or_four_corners_in_any_order(tmp_path: Path, points: Any) -> None:
    source = write(tmp_path, [shape("rectangle", [list(point) for point in points])])
    assert source.task == "detection"
    columns, rows = zip(*points)
    expected = [min(columns), min(rows), max(columns), max(rows)]
    assert annotated(source).boxes.tolist() == [expected]


def test_polygons_of_one_group_are_one_object(tmp_path: Path) -> None:
    one, two = [[1, 1], [4, 1], [4, 4]], [[8, 8], [12, 8], [12, 12]]
    shapes = [shape("polygon", one, group_id=3), shape("polygon", two, group_id=3)]
    assert annotated(write(tmp_path, shapes)).boxes.tolist() == [[1, 1, 12, 12]]
    shapes[1]["group_id"] = 4  # the control
    assert len(annotated(write(tmp_path, shapes)).boxes) == 2
    shapes[1].update(group_id=3, label="dog")
    assert len(annotated(write(tmp_path, shapes)).boxes) == 2


def test_a_circle_has_the_box_of_its_radius(tmp_path: Path) -> None:
    source = write(tmp_path, [shape("circle", [[10, 8], [13, 8]])])
    assert source.task == "instance_segmentation"
    assert annotated(source).boxes.tolist() == [[7, 5, 13, 11]]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (shape("point", [[1, 2]]), "unsupported shape"),
        (shape("linestrip", [[1, 2], [3, 4]]), "unsupported shape"),
        (shape("mask", [[1, 2], [3, 4]]), "unsupported shape"),
        (shape("polygon", [[1, 2], [3, 4]]), "unsupported shape"),
        (shape("polygon", "text"), "unreadable annotation"),
        (shape("polygon", [[1, 2], [3, "4"], [5, 6]]), "unreadable annotation"),
        (shape("polygon", [[1, 1], [99, 1], [5, 6]]), "polygon outside the image"),
        (shape("polygon", [[1, 1], [5, 6], [2, 2]], label=7), "unknown class"),
        (shape("polygon", [[1, 1], [5, 6], [2, 2]], label=" "), "unknown class"),
        ("text", "unknown class"),
    ],
)
def test_an_object_that_can_t_be_used_is_damaged(tmp_path: Path, given: Any, reason: str) -> None:
    good = shape("polygon", [[1, 1], [9, 1], [9, 9]])
    source = write(tmp_path, [good, given])
    assert source.annotate is not None
    found = source.annotate(source.items[0])
    assert isinstance(found, Objects)
    assert len(found.boxes) == 1
    assert [damage.reason for damage in found.damaged] == [reason]
    with pytest.raises(SampleError, match=r"a\.json: shape 1"):
        annotated(source)


@pytest.mark.parametrize(
    ("image", "path", "named"),
    [
        ("images/0.jpg", "labels/0.json", "..\\images\\0.jpg"),
        ("images/0.jpg", "images/other.json", "0.jpg"),
        ("images/0.jpg", "labels/0.json", "C:\\old\\place\\0.jpg"),
        ("0.jpg", "0.json", "renamed.jpg"),
    ],
)
def test_an_image_is_found_by_its_path_or_by_the_name_of_the_json(
    tmp_path: Path, image: str, path: str, named: str
) -> None:
    picture(tmp_path / image, width=WIDTH, height=HEIGHT)
    text(tmp_path / path, json.dumps({**json.loads(labelme_json(0)), "imagePath": named}))
    (item,) = labelme.read(str(tmp_path), {}).items
    assert (item.origin, item.problem) == (image, None)


def test_a_missing_image_and_a_damaged_file_are_rejected_alone(tmp_path: Path) -> None:
    each("{}.jpg", "{}.json", labelme_json, tmp_path)
    text(tmp_path / "lost.json", labelme_json(77))
    text(tmp_path / "0.json", "{")
    source = labelme.read(str(tmp_path), {})
    problems = {item.origin: item.problem[0] for item in source.items if item.problem}
    assert problems == {"lost.json": "missing image", "0.jpg": "unreadable annotation"}
    assert len(source.items) == COUNT + 1


def test_images_without_a_file_are_named(tmp_path: Path) -> None:
    each("{}.jpg", "{}.json", labelme_json, tmp_path)
    images(tmp_path, "{}.jpg", [20, 21])
    source = labelme.read(str(tmp_path), {})
    assert "2 images without JSON file, for example 20.jpg: left out" in source.notes[0]
    assert len(source.items) == COUNT
    source = labelme.read(str(tmp_path), {"unlabelled": "empty"})
    assert len(source.items) == COUNT + 2
    assert len(annotated(source, COUNT).boxes) == 0


def test_rotated_boxes_are_asked_about(tmp_path: Path) -> None:
    points = [[4, 1], [12, 4], [10, 9], [2, 6]]
    with pytest.raises(AmbiguousError, match="rotated box") as caught:
        write(tmp_path, [shape("rotation", points)])
    tasks = [reading.options["task"] for reading in caught.value.readings]
    assert tasks == ["detection", "instance_segmentation"]
    for task in tasks:
        found = annotated(labelme.read(str(tmp_path), {"task": task}))
        assert found.boxes.tolist() == [[2, 1, 12, 9]]


def test_the_list_of_names_belongs_to_the_set(tmp_path: Path) -> None:
    each("{}.jpg", "{}.json", labelme_json, tmp_path)
    path = text(tmp_path / "labels.txt", "__ignore__\n_background_\nred\nblue\n")
    assert labelme.read(str(tmp_path), {}).shared_files == (path,)
    text(path, "cat\n")  # the control: a list of other names
    assert labelme.read(str(tmp_path), {}).shared_files == ()


def test_other_json_files_are_not_shapes(tmp_path: Path) -> None:
    images(tmp_path, "{}.jpg")
    text(tmp_path / "0.json", '{"shapes": 3, "imagePath": "0.jpg"}')
    with pytest.raises(TesseraError, match="has no labelme files"):
        labelme.read(str(tmp_path), {})
    text(tmp_path / "0.json", '{"version": 1}')
    assert not labelme.recognises(str(tmp_path))


def test_an_image_inside_of_the_json_is_named(tmp_path: Path) -> None:
    images(tmp_path, "{}.jpg", [0])
    content = json.loads(labelme_json(1))
    text(tmp_path / "0.json", labelme_json(0))
    text(tmp_path / "1.json", json.dumps({**content, "imageData": "AAAA"}))
    problems = [item.problem for item in labelme.read(str(tmp_path), {}).items if item.problem]
    assert len(problems) == 1
    assert "nor one of its own name; the one inside, imageData, is not read" in problems[0][1]


def test_flags_are_named_and_never_lost(tmp_path: Path) -> None:
    flags = {"cat": True, "dog": False}
    with pytest.raises(TesseraError, match=r"have flags \(cat\) and no shapes") as caught:
        write(tmp_path, [], flags=flags)
    assert "a folder for each class" in caught.value.hint
    box = shape("rectangle", [[2, 3], [9, 8]])
    assert write(tmp_path, [box], flags=flags).notes == (
        "images have flags (cat), which are not read",
    )
    assert write(tmp_path, [box], flags={"cat": False}).notes == ()  # the control
