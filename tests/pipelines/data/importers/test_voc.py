"""PASCAL VOC: boxes counted from 1, lists for splits, and safe XML."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_sources
from layouts.base import text
from layouts.box_files import box, voc_xml
from layouts.box_sets import COUNT, each, images, in_splits
from sample_sources import HEIGHT, WIDTH

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import Objects, check, count
from pipelines.data.importers import voc
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import AmbiguousError, Source


def annotated(source: Source, row: int = 0) -> Objects:
    assert source.annotate is not None
    result = source.annotate(source.items[row])
    assert isinstance(result, Objects)
    return result


@pytest.mark.parametrize("around", ["", "VOC2007", "VOCdevkit/VOC2007"])
def test_the_usual_layout_is_read(tmp_path: Path, around: str) -> None:
    sample_sources.voc(tmp_path / "set" / around)
    assert voc.recognises(str(tmp_path / "set")) == "VOC annotations in Annotations"
    source = voc.read(str(tmp_path / "set"), {})
    assert (source.task, source.classes) == ("detection", ("cat", "dog"))
    assert Counter(item.split for item in source.items) == {"train": 2, "val": 1, "test": 1}
    result = annotated(source)
    np.testing.assert_array_equal(result.boxes, [[0, 0, WIDTH, HEIGHT], [2, 3, 9, 12]])
    assert (result.labels.tolist(), result.crowd.tolist()) == ([1, 0], [False, False])
    check(result, height=HEIGHT, width=WIDTH, classes=2, where="x")
    image, text = source.files(source.items[0])
    assert source.load(source.items[0]) == image.read_bytes()
    assert text.read_text().startswith("<annotation>")


def test_difficult_objects_are_crowds_kept_or_dropped(tmp_path: Path) -> None:
    sample_sources.voc(tmp_path / "set")
    expected = {"crowd": [False, True], "keep": [False, False], "drop": [False]}
    for word, crowd in expected.items():
        source = voc.read(str(tmp_path / "set"), {"difficult": word})
        row = next(n for n, item in enumerate(source.items) if item.key.endswith("1"))
        assert annotated(source, row).crowd.tolist() == crowd
    assert annotated(voc.read(str(tmp_path / "set"), {}), 1).crowd.tolist() == [False, True]
    with pytest.raises(UsageError, match="difficult can't be 'maybe'"):
        voc.read(str(tmp_path / "set"), {"difficult": "maybe"})


def test_trainval_is_used_without_a_train_list(tmp_path: Path) -> None:
    folder = sample_sources.voc(tmp_path / "set")
    lists = folder / "ImageSets" / "Main"
    (lists / "train.txt").unlink()
    (lists / "val.txt").unlink()
    source = voc.read(str(folder), {})
    assert Counter(item.split for item in source.items) == {"train": 3, "test": 1}
    for path in lists.iterdir():
        path.unlink()
    source = voc.read(str(folder), {})
    assert Counter(item.split for item in source.items) == {None: 4}


def test_an_image_in_two_lists_is_refused(tmp_path: Path) -> None:
    folder = sample_sources.voc(tmp_path / "set")
    (folder / "ImageSets" / "Main" / "test.txt").write_text("2007_000000\n")
    with pytest.raises(TesseraError, match="2007_000000 is in the lists train and test"):
        voc.read(str(folder), {})
    (folder / "ImageSets" / "Main" / "test.txt").write_text("../../x\n")
    with pytest.raises(TesseraError, match="not a file name"):
        voc.read(str(folder), {})


def test_unlisted_images_are_skipped_and_missing_ones_reported(tmp_path: Path) -> None:
    folder = sample_sources.voc(tmp_path / "set")
    main = folder / "ImageSets" / "Main"
    (main / "test.txt").write_text("nothing 1\n")
    (folder / "JPEGImages" / "2007_000000.jpg").unlink()
    source = voc.read(str(folder), {})
    assert source.notes[1] == "1 annotations that are in no list of ImageSets are left out"
    problems = {item.key: item.problem[0] for item in source.items if item.problem}
    assert problems == {"nothing": "missing image", "2007_000000": "missing image"}


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5, 5, 5, 9), "box without area"),
        ((5, 5, 9, 5), "box without area"),
        ((9, 5, 3, 9), "box inverted"),
        ((5, 5, 9, HEIGHT + 1), "box outside the image"),
        ((-3, 5, 9, 9), "box outside the image"),
        (("nan", 5, 9, 9), "box not finite"),
        (("inf", 5, 9, 9), "box not finite"),
        (("1_0", 5, 19, 9), "box not finite"),
        (("", 5, 9, 9), "box not finite"),
    ],
)
def test_an_invalid_box_is_rejected_with_its_reason(
    tmp_path: Path, box: tuple[Any, ...], message: str
) -> None:
    folder = sample_sources.voc(tmp_path / "set")
    text = sample_sources.voc_xml([("dog", (1, 1, 9, 9), 0), ("cat", box, 0)])
    (folder / "Annotations" / "2007_000000.xml").write_text(text)
    source = voc.read(str(folder), {})
    with pytest.raises(SampleError, match="2007_000000") as caught:
        check(annotated(source), height=HEIGHT, width=WIDTH, classes=2, where="2007_000000")
    assert caught.value.reason == message


def test_a_coordinate_of_zero_is_the_first_pixel(tmp_path: Path) -> None:
    folder = sample_sources.voc(tmp_path / "set")
    text = sample_sources.voc_xml([("dog", (0, 0, 9, 9), 0)])
    (folder / "Annotations" / "2007_000000.xml").write_text(text)
    assert annotated(voc.read(str(folder), {})).boxes.tolist() == [[0, 0, 9, 9]]


def test_a_wrong_image_size_is_refused_and_a_missing_one_accepted(tmp_path: Path) -> None:
    folder = sample_sources.voc(tmp_path / "set")
    path = folder / "Annotations" / "2007_000000.xml"
    path.write_text(sample_sources.voc_xml([("dog", (1, 1, 9, 9), 0)], (WIDTH, HEIGHT)))
    with pytest.raises(SampleError, match="its annotation is for an image"):
        annotated(voc.read(str(folder), {}))
    path.write_text(sample_sources.voc_xml([("dog", (1, 1, 9, 9), 0)], (0, 0)))
    assert len(annotated(voc.read(str(folder), {})).boxes) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<annotation>",
        "<other/>",
        "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/hostname'>]><annotation/>",
        "<annotation>" + "<a>" * 100_000,
    ],
)
def test_invalid_xml_is_rejected(tmp_path: Path, text: str) -> None:
    folder = sample_sources.voc(tmp_path / "set")
    (folder / "Annotations" / "2007_000000.xml").write_text(text)
    source = voc.read(str(folder), {})
    assert [item.key for item in source.items if item.problem] == ["2007_000000"]


def test_the_path_in_the_xml_is_never_used(tmp_path: Path) -> None:
    folder = sample_sources.voc(tmp_path / "set")
    sample_sources.image(tmp_path / "secret.jpg")
    path = folder / "Annotations" / "2007_000000.xml"
    text = path.read_text().replace("x.jpg", str(tmp_path / "secret.jpg"))
    path.write_text(text)
    source = voc.read(str(folder), {})
    assert source.load(source.items[0]) == (folder / "JPEGImages/2007_000000.jpg").read_bytes()
    (folder / "JPEGImages" / "2007_000000.jpg").unlink()
    (folder / "JPEGImages" / "2007_000000.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(TesseraError, match="is outside"):
        source.load(source.items[0])


def test_classes_can_be_set(tmp_path: Path) -> None:
    folder = sample_sources.voc(tmp_path / "set")
    source = voc.read(str(folder), {"classes": "dog, emu"})
    assert source.classes == ("dog", "emu")
    with pytest.raises(SampleError, match="has the class 'cat'"):
        check(annotated(source), height=HEIGHT, width=WIDTH, classes=2, where="x")
    with pytest.raises(UsageError, match="empty or duplicate"):
        voc.read(str(folder), {"classes": "dog,dog"})


def test_the_real_blood_cells_have_the_documented_counts(tmp_path: Path) -> None:
    """The counts are those of the set's SOURCE.md; the two boxes without area are rejected by
    name."""
    archive = sample_sources.DATA / "bccd" / "BCCD.tar"
    if not archive.is_file():
        pytest.skip("the blood cells are not here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    source = voc.read(str(tmp_path), {})
    assert (source.name, source.classes) == ("BCCD", ("Platelets", "RBC", "WBC"))
    assert Counter(item.split for item in source.items) == {"train": 205, "val": 87, "test": 72}
    boxes: Counter[tuple[str | None, str]] = Counter()
    bad = {}
    for row, item in enumerate(source.items):
        try:
            result = annotated(source, row)
            check(result, height=480, width=640, classes=3, where=item.origin)
        except SampleError as error:
            bad[item.key] = (error.reason, error.message)
            text = (tmp_path / "BCCD" / "Annotations" / f"{item.key}.xml").read_text()
            for name in source.classes:
                boxes[item.split, name] += text.count(f"<name>{name}<")
            continue
        for name, number in zip(source.classes, count(result, 3), strict=True):
            boxes[item.split, name] += number
    assert boxes == {
        ("train", "WBC"): 214,
        ("train", "RBC"): 2382,
        ("train", "Platelets"): 209,
        ("val", "WBC"): 87,
        ("val", "RBC"): 968,
        ("val", "Platelets"): 83,
        ("test", "WBC"): 71,
        ("test", "RBC"): 805,
        ("test", "Platelets"): 69,
    }
    assert {key: reason for key, (reason, _) in bad.items()} == {
        "BloodImage_00338": "box without area",
        "BloodImage_00343": "box without area",
    }
    assert "(504, 337, 504, 337)" in bad["BloodImage_00338"][1]
    assert "BloodImage_00343.xml: object" in bad["BloodImage_00343"][1]


@pytest.mark.parametrize(
    ("image", "xml"),
    [
        ("{split}/{}.jpg", "{split}/{}.xml"),
        ("images/{split}/{}.jpg", "annotations/{split}/{}.xml"),
        ("{split}/JPEGImages/{}.jpg", "{split}/Annotations/{}.xml"),
        ("data/{split}/img/{}.PNG", "data/{split}/xmls/{}.XML"),
        ("images/{split}/{}.jpg", "annotations/{}.xml"),
    ],
)
def test_xml_files_find_their_images_and_folders_are_splits(
    tmp_path: Path, image: str, xml: str
) -> None:
    in_splits(image, xml, voc_xml, tmp_path)
    assert voc.recognises(str(tmp_path))
    source = voc.read(str(tmp_path), {})
    assert source.classes == ("blue", "red")
    assert Counter(item.split for item in source.items) == {"train": 3, "val": 2, "test": 1}
    for row, item in enumerate(source.items):
        number = int(Path(item.origin).stem)
        left, top, width, height = box(number)
        assert annotated(source, row).boxes.tolist() == [[left, top, left + width, top + height]]
        assert source.files(item)[1].stem == str(number)


def test_images_without_xml_are_named_or_have_no_objects(tmp_path: Path) -> None:
    each("images/{}.jpg", "annotations/{}.xml", voc_xml, tmp_path)
    images(tmp_path, "images/{}.jpg", range(20, 23))
    source = voc.read(str(tmp_path), {})
    assert "3 images without XML file, for example images/20.jpg: left out" in source.notes[0]
    assert len(source.items) == COUNT
    source = voc.read(str(tmp_path), {"unlabelled": "empty"})
    assert len(source.items) == COUNT + 3
    assert [len(annotated(source, row).boxes) for row in (0, COUNT)] == [1, 0]
    assert [len(source.files(source.items[row])) for row in (0, COUNT)] == [2, 1]


def test_lists_may_name_files(tmp_path: Path) -> None:
    each("images/{}.png", "annotations/{}.xml", voc_xml, tmp_path)
    for name, numbers in {"train.txt": range(4), "val.txt": range(4, COUNT)}.items():
        lines = [f"./images/{n}.png ./annotations/{n}.xml" for n in numbers]
        (tmp_path / name).write_text("\n".join(lines))
    source = voc.read(str(tmp_path), {})
    assert Counter(item.split for item in source.items) == {"train": 4, "val": 2}


@pytest.mark.parametrize("encoding", ["GBK", "gb2312", "Big5"])
def test_names_in_other_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    for number in images(tmp_path, "images/{}.jpg"):
        text(
            tmp_path / "annotations" / f"{number}.xml",
            head + voc_xml(number).replace("red", "中"),
            encoding,
        )
    assert voc.read(str(tmp_path), {}).classes == ("blue", "中")


def test_files_that_can_t_be_read_say_why(tmp_path: Path) -> None:
    for number in images(tmp_path, "images/{}.jpg"):
        xml = voc_xml(number).replace("red", "中").replace("blue", "中")
        text(tmp_path / "annotations" / f"{number}.xml", xml, "gbk")
    with pytest.raises(TesseraError, match=r"0\.xml is not in the encoding UTF-8.*name its enc"):
        voc.read(str(tmp_path), {})


def test_a_damaged_object_doesn_t_hide_the_others(tmp_path: Path) -> None:
    folder = sample_sources.voc(tmp_path / "set")
    objects = [("dog", (1, 1, 9, 9), 0), ("", (1, 1, 9, 9), 0), ("cat", (5, 5, 5, 9), 0)]
    path = folder / "Annotations" / "2007_000000.xml"
    path.write_text(sample_sources.voc_xml(objects))
    found = annotated(voc.read(str(folder), {}))
    assert len(found.boxes) == 1
    assert [damage.reason for damage in found.damaged] == ["unknown class", "box without area"]


ROTATED = {
    "CVAT": "<attributes><attribute><name>rotation</name><value>{}</value></attribute>"
    "</attributes>",
    "roLabelImg": "<robndbox><cx>9</cx><cy>8</cy><w>6</w><h>4</h><angle>{}</angle></robndbox>",
}


@pytest.mark.parametrize("tool", list(ROTATED))
def test_a_rotated_box_is_damaged(tmp_path: Path, tool: str) -> None:
    each("{}.jpg", "{}.xml", voc_xml, tmp_path)
    extra = ROTATED[tool].format("0.5")
    xml = (tmp_path / "0.xml").read_text().replace("</name>", f"</name>{extra}")
    if tool == "roLabelImg":
        xml = re.sub("<bndbox>.*</bndbox>", "", xml)
    (tmp_path / "0.xml").write_text(xml)
    (damage,) = annotated(voc.read(str(tmp_path), {})).damaged
    assert (damage.reason, "--drop boxes" in damage.hint) == ("unsupported shape", True)
    (tmp_path / "0.xml").write_text(voc_xml(0).replace("</name>", "</name><attributes/>"))
    assert not annotated(voc.read(str(tmp_path), {})).damaged  # the control


def test_polygons_beside_boxes_are_asked_about(tmp_path: Path) -> None:
    """Otherwise a set for masks would become one for boxes without a message."""
    each("{}.jpg", "{}.xml", voc_xml, tmp_path)
    assert voc.read(str(tmp_path), {}).task == "detection"  # the control
    ring = "<polygon><x1>3</x1><y1>3</y1><x2>9</x2><y2>3</y2><x3>9</x3><y3>9</y3></polygon>"
    (tmp_path / "3.xml").write_text(voc_xml(3).replace("<bndbox>", f"{ring}<bndbox>"))
    with pytest.raises(AmbiguousError, match=r"3\.xml has polygons.*as COCO") as caught:
        voc.read(str(tmp_path), {"difficult": "keep"})
    (reading,) = caught.value.readings
    assert reading.options == {"difficult": "keep", "task": "detection"}
    assert len(annotated(voc.read(str(tmp_path), reading.options), 3).boxes) == 1
