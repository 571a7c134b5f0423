"""CVAT for images: boxes, polygons, ellipses and masks; subsets; what has no area."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts.base import text
from layouts.box_files import HEIGHT, WIDTH, box, cvat_xml
from layouts.box_sets import COUNT, images

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects, check, mask_pixels
from pipelines.data.importers import cvat
from pipelines.data.sources import Source


def annotated(source: Source, row: int = 0) -> Objects:
    assert source.annotate is not None
    found = source.annotate(source.items[row])
    assert isinstance(found, Objects)
    return found


def one(folder: Path, shape: str, task: str = "") -> Objects:
    """The objects of an image with one box and `shape`."""
    images(folder, "images/{}.jpg", [0])
    text(folder / "a.xml", cvat_xml([0]).replace("</image>", f"{shape}</image>"))
    return annotated(cvat.read(str(folder), {"task": task} if task else {}))


@pytest.mark.parametrize("kind", ["box", "polygon", "mask"])
def test_shapes_are_read(tmp_path: Path, kind: str) -> None:
    images(tmp_path, "images/{}.jpg")
    text(tmp_path / "annotations.xml", cvat_xml(range(COUNT), kind))
    assert cvat.recognises(str(tmp_path)) == "CVAT annotations in annotations.xml"
    source = cvat.read(str(tmp_path), {})
    assert source.classes == ("red", "blue")
    assert source.task == ("detection" if kind == "box" else "instance_segmentation")
    for row in range(COUNT):
        found, (left, top, width, height) = annotated(source, row), box(row)
        check(found, height=HEIGHT, width=WIDTH, classes=2, where="x")
        assert found.boxes.tolist() == [[left, top, left + width, top + height]]
        assert found.labels.tolist() == [row % 2]
        if kind == "mask":
            pixels = mask_pixels(found, HEIGHT, WIDTH)[0]
            assert pixels.sum() == width * height == pixels[top:, left:].sum()


def test_a_mask_is_run_lengths_of_rows_in_its_box(tmp_path: Path) -> None:
    mask = '<mask label="red" rle="1, 2, 3, 4, 2" left="2" top="1" width="4" height="3"></mask>'
    images(tmp_path, "images/{}.jpg", [0])
    text(
        tmp_path / "a.xml",
        cvat_xml([0], "track").replace("<track", "<!-- ").replace("</track>", "-->"),
    )
    head, _, _ = cvat_xml([]).partition("</annotations>")
    row = f'<image id="0" name="0.jpg" width="{WIDTH}" height="{HEIGHT}">{mask}</image>'
    text(tmp_path / "a.xml", f"{head}{row}</annotations>")
    pixels = mask_pixels(annotated(cvat.read(str(tmp_path), {})), HEIGHT, WIDTH)[0]
    expected = np.array([[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], np.uint8)
    np.testing.assert_array_equal(pixels[1:4, 2:6], expected)
    assert pixels.sum() == expected.sum()


def test_an_ellipse_is_a_polygon(tmp_path: Path) -> None:
    found = one(tmp_path, '<ellipse label="red" cx="10" cy="8" rx="4" ry="2"></ellipse>')
    assert found.boxes.tolist() == [[6, 6, 14, 10]]
    assert [damage.reason for damage in found.damaged] == ["missing mask"]  # the box beside it


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ('<points label="red" points="1,2"/>', "unsupported shape"),
        ('<polyline label="red" points="1,2;3,4"/>', "unsupported shape"),
        ('<box label="red" xtl="1" ytl="1" xbr="5" ybr="5" rotation="30"/>', "unsupported shape"),
        ('<box label="red" xtl="1" ytl="1" xbr="nan" ybr="5"/>', "unreadable annotation"),
        ('<box label="red" xtl="1" ytl="1"/>', "unreadable annotation"),
        ('<box xtl="1" ytl="1" xbr="5" ybr="5"/>', "unknown class"),
        ('<box label="emu" xtl="1" ytl="1" xbr="5" ybr="5"/>', "unknown class"),
    ],
)
def test_an_object_that_can_t_be_used_is_damaged(tmp_path: Path, shape: str, reason: str) -> None:
    found = one(tmp_path, shape)
    assert len(found.boxes) == 1
    assert [damage.reason for damage in found.damaged] == [reason]


@pytest.mark.parametrize("rle", ["", "1,2", "5,x", "0,999"])
def test_a_mask_that_doesn_t_fill_its_box_is_damaged(tmp_path: Path, rle: str) -> None:
    shape = f'<mask label="red" rle="{rle}" left="1" top="1" width="4" height="3"/>'
    reasons = {damage.reason for damage in one(tmp_path, shape, "instance_segmentation").damaged}
    assert reasons & {"unreadable mask", "unreadable annotation"}


def test_subsets_are_splits_and_folders_in_names_are_kept(tmp_path: Path) -> None:
    images(tmp_path, "images/Train/{}.jpg", range(3))
    images(tmp_path, "images/Validation/{}.jpg", range(3))
    head, _, rows = cvat_xml(range(3)).partition("<image ")
    rows = f"<image {rows.removesuffix('</annotations>')}"
    both = "".join(
        rows.replace('name="', f'name="{name}/').replace("<image ", f'<image subset="{name}" ')
        for name in ("Train", "Validation")
    )
    text(tmp_path / "a.xml", f"{head}{both}</annotations>")
    source = cvat.read(str(tmp_path), {})
    assert [(item.origin, item.split) for item in source.items] == [
        *((f"images/Train/{n}.jpg", "train") for n in range(3)),
        *((f"images/Validation/{n}.jpg", "val") for n in range(3)),
    ]


def test_videos_and_other_files_are_refused(tmp_path: Path) -> None:
    images(tmp_path, "images/{}.jpg")
    text(tmp_path / "a.xml", cvat_xml([], "track"))
    with pytest.raises(TesseraError, match="CVAT for video"):
        cvat.read(str(tmp_path), {})
    text(tmp_path / "a.xml", "<annotation></annotation>")  # VOC's
    assert not cvat.recognises(str(tmp_path))
    with pytest.raises(TesseraError, match="has no file in the format CVAT"):
        cvat.read(str(tmp_path), {})


def test_tags_are_named(tmp_path: Path) -> None:
    one(tmp_path, '<tag label="red"/>')
    assert cvat.read(str(tmp_path), {}).notes == ("a.xml: 1 images have tags, which are not read",)


def test_tags_alone_are_refused(tmp_path: Path) -> None:
    """Otherwise a set of classes would be packed as one of boxes, all images without any."""
    images(tmp_path, "images/{}.jpg", [0])
    head, _, _ = cvat_xml([]).partition("</annotations>")
    row = f'<image id="0" name="0.jpg" width="{WIDTH}" height="{HEIGHT}"><tag label="red"/></image>'
    text(tmp_path / "a.xml", f"{head}{row}</annotations>")
    with pytest.raises(TesseraError, match=r"have tags and no shapes.*a folder for each class"):
        cvat.read(str(tmp_path), {})
