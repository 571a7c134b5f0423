"""Objects of annotation tools: boxes, polygons and run lengths become boxes and masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from models.core.errors import TesseraError, UsageError
from pipelines.data import rle
from pipelines.data.annotations import Objects
from pipelines.data.importers.support.shapes import Shape, ShapedImage, make_source

SQUARE = Shape("cat", "a.png, object 0", rings=((1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0),))
BOX = Shape("dog", "a.png, object 1", box=(2.0, 2.0, 6.0, 7.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def annotate(folder: Path, *shapes: Shape, **options: str) -> Objects:
    source = make_source(folder, [ShapedImage("a.png", shapes)], options)
    assert source.annotate is not None
    found = source.annotate(source.items[0])
    assert isinstance(found, Objects)
    return found


def test_a_polygon_has_a_box_around_it_and_a_mask(folder: Path) -> None:
    found = annotate(folder, SQUARE)
    assert found.boxes.tolist() == [[1, 1, 5, 5]]
    assert found.masks is not None
    assert rle.area(rle.parse(found.masks[0], 8, 8)) == 16


def test_run_lengths_fill_their_box(folder: Path) -> None:
    shape = replace(SQUARE, rings=(), box=(2.0, 2.0, 4.0, 4.0), counts=(1, 2, 1))
    found = annotate(folder, shape)
    assert found.masks is not None
    assert rle.area(rle.parse(found.masks[0], 8, 8)) == 2
    (damage,) = annotate(folder, SQUARE, replace(shape, counts=(1, 1))).damaged
    assert "don't fill its box" in damage.message


def test_the_task_is_told_from_the_shapes(folder: Path) -> None:
    image = ShapedImage("a.png", (SQUARE, BOX))
    both = make_source(folder, [image], {})
    assert both.task == "instance_segmentation"
    assert "1 of 2 objects are boxes" in both.notes[0]
    assert make_source(folder, [image], {"task": "detection"}).task == "detection"
    assert make_source(folder, [ShapedImage("a.png", (BOX,))], {}).task == "detection"


def test_classes_are_given_or_those_that_occur(folder: Path) -> None:
    image = ShapedImage("a.png", (BOX, SQUARE))
    assert make_source(folder, [image], {}).classes == ("cat", "dog")
    assert make_source(folder, [image], {"classes": "dog, cat"}).classes == ("dog", "cat")
    with pytest.raises(UsageError, match="empty or duplicate"):
        make_source(folder, [image], {"classes": "cat,,dog"})
    with pytest.raises(TesseraError, match="have no objects"):
        make_source(folder, [ShapedImage("a.png")], {})
    (damage,) = annotate(folder, BOX, classes="cat").damaged
    assert damage.message == "a.png, object 1 has the class 'dog'"


def test_normalised_corners_are_parts_of_the_size(folder: Path) -> None:
    image = ShapedImage("a.png", (replace(BOX, box=(0.25, 0.5, 0.5, 1.0)),), normalised=True)
    source = make_source(folder, [image], {})
    assert source.annotate is not None
    found = source.annotate(source.items[0])
    assert isinstance(found, Objects)
    assert found.boxes.tolist() == [[2, 4, 4, 8]]
