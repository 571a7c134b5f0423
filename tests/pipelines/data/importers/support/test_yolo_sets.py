"""Which text belongs to which image, names of classes, and splits, in every layout of YOLO."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from layouts.base import picture, text
from layouts.box_files import HEIGHT, WIDTH, box, yolo_line
from layouts.box_sets import COUNT, each, images

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects, check
from pipelines.data.importers import yolo
from pipelines.data.importers.support.yolo_sets import pair_texts
from pipelines.data.sources import AmbiguousError, Source

YAML = "names: [red, blue]\n"


def read(
    folder: Path,
    files: Mapping[str, str],
    image: str = "images/{}.jpg",
    label: str = "labels/{}.txt",
    kind: str = "box",
    options: Mapping[str, str] = {},
) -> Source:
    each(image, label, lambda number: yolo_line(number, kind), folder)
    for name, content in files.items():
        text(folder / name, content)
    assert yolo.recognises(str(folder))
    return yolo.read(str(folder), options)


def annotated(source: Source, row: int = 0) -> Objects:
    assert source.annotate is not None
    found = source.annotate(source.items[row])
    assert isinstance(found, Objects)
    check(found, height=HEIGHT, width=WIDTH, classes=len(source.classes), where="x")
    return found


@pytest.mark.parametrize(
    ("image", "label", "names"),
    [
        ("images/{}.jpg", "labels/{}.txt", "classes.txt"),
        ("images/{}.jpg", "labels/{}.txt", "labels/classes.txt"),
        ("{}.jpg", "{}.txt", "classes.txt"),
        ("in/ner/{}.jpg", "in/ner/{}.txt", "in/ner/classes.txt"),
        ("obj_train_data/{}.jpg", "obj_train_data/{}.txt", "obj.names"),
        ("train/{}.jpg", "train/{}.txt", "train/_darknet.labels"),
        ("images/{}.jpg", "labels/{}.jpg.txt", "voc.names"),
        ("{}.JPG", "{}.TXT", "classes.txt"),
        ("images/a/b/{}.png", "labels/a/b/{}.txt", "obj.names"),
    ],
)
def test_every_text_finds_its_image_and_every_class_its_name(
    tmp_path: Path, image: str, label: str, names: str
) -> None:
    source = read(tmp_path, {names: "red\nblue\n"}, image, label)
    assert (source.classes, len(source.items)) == (("red", "blue"), COUNT)
    for row in range(COUNT):
        left, top, width, height = box(row)
        found = annotated(source, row)
        expected = [left, top, left + width, top + height]
        assert found.boxes[0].tolist() == pytest.approx(expected, abs=1e-3)
        image_path, text_path = source.files(source.items[row])
        assert image_path.name.partition(".")[0] == text_path.name.partition(".")[0] == str(row)


def test_two_images_of_one_name_share_their_text() -> None:
    files = ["images/a.jpg", "images/a.png", "images/b.jpg", "labels/a.txt", "labels/b.jpg.txt"]
    assert pair_texts(files) == {
        "images/a.jpg": "labels/a.txt",
        "images/a.png": "labels/a.txt",
        "images/b.jpg": "labels/b.jpg.txt",
    }
    assert pair_texts(["images/a.jpg", "images/b.png", "labels/a.jpg.txt"]) == {
        "images/a.jpg": "labels/a.jpg.txt"
    }


LISTS = {
    "data.yaml": {"data.yaml": f"train: a.txt\nval: [b.txt]\n{YAML}"},
    "with paths": {"data.yaml": f"path: /x\ntrain: ./l/../a.txt\nval: /y/b.txt\n{YAML}"},
    "Darknet": {
        "obj.data": "classes=2\ntrain = data/a.txt\nvalid=data\\b.txt\n",
        "obj.names": "red\nblue",
    },
}


@pytest.mark.parametrize("form", list(LISTS))
@pytest.mark.parametrize("line", ["images/{}.jpg", "./images/{}.jpg", "D:\\set\\images\\{}.jpg\r"])
def test_lists_assign_images_to_splits(tmp_path: Path, form: str, line: str) -> None:
    lists = {
        name: "".join(line.format(number) + "\n" for number in numbers)
        for name, numbers in {"a.txt": range(3), "b.txt": range(3, 5)}.items()
    }
    source = read(tmp_path, {**LISTS[form], **lists})
    assert Counter(item.split for item in source.items) == {"train": 3, "val": 2}
    assert {path.name for path in source.shared_files} == {*LISTS[form], *lists}
    assert "1 images are in no list of the set and are left out" in source.notes


def test_lists_at_the_top_are_used_without_settings(tmp_path: Path) -> None:
    names = "".join(f"images/{n}.jpg\n" for n in range(COUNT))
    source = read(tmp_path, {"Train.txt": names, "classes.txt": "red\nblue"})
    assert Counter(item.split for item in source.items) == {"train": COUNT}
    text(tmp_path / "Train.txt", "no images\n")  # the control
    assert {item.split for item in yolo.read(str(tmp_path), {}).items} == {None}


def test_the_same_images_for_two_splits_are_train(tmp_path: Path) -> None:
    names = "".join(f"images/{n}.jpg\n" for n in range(COUNT))
    settings = {"data.yaml": f"train: a.txt\nval: b.txt\n{YAML}", "a.txt": names, "b.txt": names}
    source = read(tmp_path, settings)
    assert Counter(item.split for item in source.items) == {"train": COUNT}
    assert "data.yaml has the same images for train and val" in source.notes[0]
    text(tmp_path / "b.txt", "images/1.jpg\nimages/9.jpg\n")
    picture(tmp_path / "images" / "9.jpg", 9)
    with pytest.raises(TesseraError, match=r"images/1\.jpg is listed as train and, in b.txt, as v"):
        yolo.read(str(tmp_path), {})


@pytest.mark.parametrize("split", ["test", "val"])
@pytest.mark.parametrize("place", ["images/{}", "{}/images"])
def test_a_split_without_labels_is_left_out(tmp_path: Path, split: str, place: str) -> None:
    train = place.format("train")
    images(tmp_path, f"{place.format(split)}/{{}}.jpg", range(20, 23))
    label = f"{train}/{{}}.txt".replace("images", "labels")
    source = read(tmp_path, {"data.yaml": YAML}, f"{train}/{{}}.jpg", label)
    assert {item.split for item in source.items} == {"train"}
    assert f"the 3 images of {split} are without any label file" in source.notes[0]
    source = yolo.read(str(tmp_path), {"unlabelled": "empty"})
    assert Counter(item.split for item in source.items) == {"train": COUNT, split: 3}
    assert not len(annotated(source, [i.split for i in source.items].index(split)).boxes)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data.yaml": YAML, "classes.txt": "blue\nred\n"}, "have different names of classes"),
        ({"data.yaml": f"{YAML}nc: 3\n"}, "says that there are 3 classes, and data.yaml names 2"),
        ({"obj.data": "classes = 1\n", "obj.names": "red\nblue\n"}, "there are 1 classes"),
        ({}, "has no names of classes"),
    ],
)
def test_names_that_don_t_agree_are_refused(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    with pytest.raises(TesseraError, match=message):
        read(tmp_path, files)
    assert yolo.read(str(tmp_path), {"classes": "red,blue"}).classes == ("red", "blue")


def test_two_settings_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match=r"a\.yaml and b\.yaml have different names"):
        read(tmp_path, {"a.yaml": YAML, "b.yaml": "names: [x]\n"})
    text(tmp_path / "b.yaml", YAML)
    assert yolo.read(str(tmp_path), {}).classes == ("red", "blue")


def test_files_that_agree_belong_to_the_set(tmp_path: Path) -> None:
    notes = json.dumps({"categories": [{"id": 0, "name": "red"}], "info": {}})
    files = {"data.yaml": YAML, "classes.txt": "red\nblue\n", "notes.json": notes}
    source = read(tmp_path, files)
    assert {path.name for path in source.shared_files} == set(files)
    source = read(tmp_path, {"hyp.yaml": "lr0: 0.1\n"})
    assert tmp_path / "hyp.yaml" not in source.shared_files


def test_settings_above_the_folder_of_the_set_are_read(tmp_path: Path) -> None:
    source = read(tmp_path, {"data.yaml": YAML}, "set/images/{}.jpg", "set/labels/{}.txt")
    assert source.classes == ("red", "blue")
    assert source.shared_files == (tmp_path / "data.yaml",)


@pytest.mark.parametrize(
    ("kind", "files", "tasks"),
    [
        ("pose", {"data.yaml": f"{YAML}kpt_shape: [2, 3]\n"}, ["detection"]),
        ("pose", {"data.yaml": f"{YAML}task: pose\n"}, ["detection"]),
        ("pose", {"classes.txt": "red\nblue\n"}, ["detection"]),
        ("corners", {"data.yaml": YAML}, ["instance_segmentation", "detection"]),
        ("corners", {"data.yaml": f"{YAML}task: obb\n"}, ["instance_segmentation", "detection"]),
    ],
)
def test_labels_of_other_tasks_are_asked_about(
    tmp_path: Path, kind: str, files: dict[str, str], tasks: list[str]
) -> None:
    with pytest.raises(AmbiguousError) as caught:
        read(tmp_path, files, kind=kind)
    assert [reading.options["task"] for reading in caught.value.readings] == tasks
    for task in tasks:
        source = yolo.read(str(tmp_path), {"task": task})
        left, top, width, height = box(1)
        found = annotated(source, 1)
        assert (source.task, found.masks is None) == (task, task == "detection")
        expected = [left, top, left + width, top + height]
        assert found.boxes[0].tolist() == pytest.approx(expected, abs=1e-3)


def test_labels_that_belong_to_no_image_are_named(tmp_path: Path) -> None:
    images(tmp_path, "images/a{}.jpg")
    for number in range(COUNT):
        text(tmp_path / "labels" / f"b{number}.txt", yolo_line(number))
    text(tmp_path / "data.yaml", YAML)
    with pytest.raises(TesseraError, match=r"labels/b0\.txt and images/a0\.jpg"):
        yolo.read(str(tmp_path), {})


def test_a_class_s_name_in_place_of_its_number_is_named(tmp_path: Path) -> None:
    each("images/{}.jpg", "labels/{}.txt", lambda _: "cat 0.5 0.5 0.1 0.1\n", tmp_path)
    text(tmp_path / "data.yaml", YAML)
    assert yolo.recognises(str(tmp_path))
    with pytest.raises(TesseraError, match="'cat' is not a class from 0 to 1"):
        annotated(yolo.read(str(tmp_path), {}))
