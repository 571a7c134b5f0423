"""COCO files are found by what is in them, their images and classes by any form of name and id."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from layouts.base import text
from layouts.box_files import coco as coco_content
from layouts.box_sets import COUNT, images

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects
from pipelines.data.importers import coco
from pipelines.data.sources import AmbiguousError, Source


def annotated(source: Source, row: int = 0) -> Objects:
    assert source.annotate is not None
    result = source.annotate(source.items[row])
    assert isinstance(result, Objects)
    return result


def write(folder: Path, path: str = "a.json", **change: Any) -> dict[str, Any]:
    """Six images in images/ and a COCO file, with other values at its top."""
    images(folder, "images/{}.jpg")
    content = {**coco_content([f"{number}.jpg" for number in range(COUNT)]), **change}
    text(folder / path, json.dumps(content))
    return content


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("labels.json", None),
        ("result.json", None),
        ("annotations/train.json", "train"),
        ("annotations/train_annotations.json", "train"),
        ("annotations/coco_val2017.json", "val"),
        ("test/labels.json", "test"),
        ("valid/_annotations.coco.json", "val"),
        ("train/annotation_coco.json", "train"),
        ("annotations/instances_default.json", None),
        ("deep/er/training/coco.json", "train"),
    ],
)
def test_a_file_of_any_name_is_found_by_its_content(
    tmp_path: Path, path: str, split: str | None
) -> None:
    write(tmp_path, path)
    assert coco.recognises(str(tmp_path)) == f"COCO annotations in {path}"
    source = coco.read(str(tmp_path), {})
    assert {item.split for item in source.items} == {split}
    assert not any(item.problem for item in source.items)
    assert source.shared_files == (tmp_path / path,)


@pytest.mark.parametrize(
    "content",
    [
        {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a cat"}]},
        {"shapes": [], "imagePath": "0.jpg", "images": [], "annotations": [], "categories": []},
        {"annotations": [{"image_id": 1, "segments_info": [{"category_id": 1}]}]},
        [{"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 1, "score": 0.5}],
        {"images": [], "labels": {}},
    ],
)
def test_captions_results_and_other_files_are_not_coco(tmp_path: Path, content: Any) -> None:
    images(tmp_path, "images/{}.jpg")
    text(tmp_path / "a.json", json.dumps(content))
    assert not coco.recognises(str(tmp_path))


def test_keypoints_of_the_same_split_are_not_read_twice(tmp_path: Path) -> None:
    content = write(tmp_path, "annotations/instances_train.json")
    rows = [{**row, "num_keypoints": 1, "keypoints": [1, 1, 2]} for row in content["annotations"]]
    text(
        tmp_path / "annotations" / "person_keypoints_train.json",
        json.dumps({**content, "annotations": rows}),
    )
    assert [p.name for p in coco.read(str(tmp_path), {}).shared_files] == ["instances_train.json"]
    (tmp_path / "annotations" / "instances_train.json").unlink()  # the control: alone it is read
    assert len(coco.read(str(tmp_path), {"task": "detection"}).items) == COUNT


def test_keypoints_alone_are_asked_about(tmp_path: Path) -> None:
    """Otherwise a set for poses would become one for boxes without a message."""
    content = write(tmp_path)
    rows = content["annotations"]
    write(tmp_path, annotations=[{**rows[0], "keypoints": [1, 1, 2]}, *rows[1:]])
    with pytest.raises(AmbiguousError, match=rf"1 of {len(rows)} objects .* have keypoints") as err:
        coco.read(str(tmp_path), {"exif": "upright"})
    offered = [dict(reading.options) for reading in err.value.readings]
    assert [options.pop("exif") for options in offered] == ["upright"] * len(offered)
    tasks = [options["task"] for options in offered]
    assert [coco.read(str(tmp_path), options).task for options in offered] == tasks
    assert tasks[-1] == "detection"
    write(tmp_path, annotations=[{**rows[0], "keypoints": []}, *rows[1:]])  # the control
    assert len(coco.read(str(tmp_path), {}).items) == COUNT


def test_an_image_under_two_ids_keeps_the_annotations_of_both(tmp_path: Path) -> None:
    """As in files that scripts have merged."""
    content = write(tmp_path)
    before = annotated(coco.read(str(tmp_path), {})).boxes.tolist()
    again = {**content["images"][0], "id": 99}
    first = {**content["annotations"][0], "image_id": 99}
    more = [{**first, "id": 98}, {**first, "id": 99, "bbox": [0, 0, 5, 5]}]
    change = {"annotations": [*content["annotations"], *more]}
    write(tmp_path, images=[*content["images"], again], **change)
    source = coco.read(str(tmp_path), {})
    assert len(source.items) == len({item.origin for item in source.items}) == COUNT
    assert annotated(source).boxes.tolist() == [*before, [0, 0, 5, 5]]
    assert any("lists 1 images again under another id" in note for note in source.notes)
    write(tmp_path, images=[*content["images"], {**again, "width": 7}], **change)
    (item,) = [item for item in coco.read(str(tmp_path), {}).items if item.problem]
    assert item.problem
    assert "0.jpg twice, with different sizes" in item.problem[1]


@pytest.mark.parametrize("angle", [45.0, 318.3, -10])
def test_a_rotated_box_is_damaged(tmp_path: Path, angle: float) -> None:
    content = write(tmp_path)
    rows = [{**row, "segmentation": []} for row in content["annotations"]]
    for given in (angle, 0.0, 360):
        turned = {**rows[0], "attributes": {"occluded": False, "rotation": given}}
        write(tmp_path, annotations=[turned, *rows[1:]])
        found = annotated(coco.read(str(tmp_path), {})).damaged
        assert [one.reason for one in found] == ["unsupported shape"] * (given == angle)


@pytest.mark.parametrize("form", [int, float, str, lambda n: f"{n}.0", lambda n: f"id-{n}"])
@pytest.mark.parametrize("of_annotations", [True, False])
def test_ids_of_any_form_are_equal(tmp_path: Path, form: Any, of_annotations: bool) -> None:
    content = coco_content([f"{number}.jpg" for number in range(COUNT)])
    for row in content["annotations"]:
        row["image_id"], row["category_id"] = form(row["image_id"]), form(row["category_id"])
    for row in content["images"] + content["categories"]:
        row["id"] = form(row["id"]) if of_annotations or form(1) == "id-1" else row["id"]
    write(tmp_path, **content)
    source = coco.read(str(tmp_path), {})
    assert [annotated(source, row).labels.tolist() for row in range(COUNT)] == [[0], [1]] * 3
    assert not source.orphans


def test_annotations_of_images_that_aren_t_listed_are_orphans(tmp_path: Path) -> None:
    content = write(tmp_path)
    lost = [{**content["annotations"][0], "id": n, "image_id": n} for n in (98, "x", [7])]
    write(tmp_path, annotations=[*content["annotations"], *lost])
    source = coco.read(str(tmp_path), {})
    assert [reason for reason, _ in source.orphans] == ["annotation without image"] * 3
    assert "annotation 98 belongs to the image '98', which is not listed" in source.orphans[0][1]
    assert sum(len(annotated(source, row).boxes) for row in range(COUNT)) == COUNT


@pytest.mark.parametrize("empty", [[], None, {}])
def test_an_object_without_a_mask_doesn_t_drop_the_others(tmp_path: Path, empty: Any) -> None:
    content = write(tmp_path)
    content["annotations"][3]["segmentation"] = empty
    write(tmp_path, **content)
    source = coco.read(str(tmp_path), {})
    assert source.task == "instance_segmentation"
    assert "1 of 6 objects have no segmentation" in source.notes[1]
    assert [damage.reason for damage in annotated(source, 3).damaged] == ["missing mask"]
    assert annotated(source, 2).masks
    source = coco.read(str(tmp_path), {"task": "detection"})
    assert not annotated(source, 3).damaged


def test_an_image_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "annotations/train.json")
    write(tmp_path, "annotations/val.json")
    with pytest.raises(TesseraError, match=r"images/0\.jpg is listed in .*train.*val") as caught:
        coco.read(str(tmp_path), {})
    assert "--option train=annotations/train.json" in caught.value.hint
    assert len(coco.read(str(tmp_path), {"train": "annotations/train.json"}).items) == COUNT


def test_a_file_of_images_alone_is_no_split_to_test_on(tmp_path: Path) -> None:
    write(tmp_path, "annotations/instances_train.json")
    images(tmp_path, "test/{}.jpg", range(20, 23))
    content = coco_content([f"{number}.jpg" for number in range(20, 23)])
    text(tmp_path / "annotations/instances_test.json", json.dumps({**content, "annotations": []}))
    source = coco.read(str(tmp_path), {})
    assert {item.split for item in source.items} == {"train"}
    assert "3 images and no annotation: left out" in source.notes[-1]
    source = coco.read(str(tmp_path), {"unlabelled": "empty"})
    assert Counter(item.split for item in source.items) == {"train": COUNT, "test": 3}


def test_classes_are_the_same_names_whatever_their_ids_in_another_file(tmp_path: Path) -> None:
    write(tmp_path, "train/labels.json")
    images(tmp_path, "val/data/{}.jpg", range(20, 23))
    content = coco_content([f"{number}.jpg" for number in range(20, 23)])
    for row in (*content["categories"], *content["annotations"]):
        key = "id" if "name" in row else "category_id"
        row[key] = 30 - row[key]
    text(tmp_path / "val" / "labels.json", json.dumps(content))
    source = coco.read(str(tmp_path), {})
    assert source.classes == ("red", "blue")
    names = [source.classes[annotated(source, row).labels[0]] for row in range(COUNT + 3)]
    assert names == [*["red", "blue"] * 3, "red", "blue", "red"]


def test_the_category_of_the_whole_set_is_left_out(tmp_path: Path) -> None:
    content = write(tmp_path)
    whole = {"id": 0, "name": "red", "supercategory": "none"}
    write(tmp_path, categories=[whole, *content["categories"]])
    assert coco.read(str(tmp_path), {}).classes == ("red", "blue")


def test_a_file_without_file_names_has_addresses(tmp_path: Path) -> None:
    content = write(tmp_path)
    for row in content["images"]:
        row["coco_url"] = f"http://images.cocodataset.org/train2017/{row.pop('file_name')}"
    write(tmp_path, **content)
    assert not any(item.problem for item in coco.read(str(tmp_path), {}).items)
