"""COCO: every form of mask agrees with pycocotools, and errors name the annotation."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_sources
from pycocotools import mask as reference
from pycocotools.coco import COCO
from sample_sources import HEIGHT, WIDTH

from models.core.errors import TesseraError, UsageError
from pipelines.data import rle
from pipelines.data.annotations import Objects, check, encode, mask_pixels
from pipelines.data.importers import coco
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Source

# pycocotools' arrays don't know NumPy 2's `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def change(
    folder: Path, edit: Callable[[dict[str, Any]], object], split: str = "train2017"
) -> None:
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def annotated(source: Source, row: int = 0) -> Objects:
    assert source.annotate is not None
    result = source.annotate(source.items[row])
    assert isinstance(result, Objects)
    return result


def refused(folder: Path) -> SampleError:
    source = coco.read(str(folder), {})
    with pytest.raises(SampleError, match=r"^train2017/000000\.jpg") as caught:
        check(
            annotated(source), height=HEIGHT, width=WIDTH, classes=3, where="train2017/000000.jpg"
        )
    return caught.value


def test_the_usual_layout_is_read(tmp_path: Path) -> None:
    folder = sample_sources.coco(tmp_path / "set")
    assert "instances_train2017.json" in coco.recognises(str(folder))
    source = coco.read(str(folder), {})
    assert (source.name, source.task) == ("set", "instance_segmentation")
    assert source.classes == ("dog", "emu", "cat")
    assert Counter(item.split for item in source.items) == {"train": 3, "val": 3}
    assert not any(item.problem for item in source.items)
    first = source.items[0]
    assert (first.key, first.origin) == ("train2017/000000", "train2017/000000.jpg")
    assert source.load(first) == (folder / first.origin).read_bytes()
    assert [p.name for p in source.files(first)] == [
        "000000.jpg",
        "instances_train2017.json",
        "instances_val2017.json",
    ]
    result = annotated(source)
    assert result.labels.tolist() == [0, 1, 2, 0]
    assert result.crowd.tolist() == [False, True, False, False]
    np.testing.assert_array_equal(result.boxes, [[2, 3, 12.5, 15.25]] * 4)
    check(result, height=HEIGHT, width=WIDTH, classes=3, where="x")


def test_masks_agree_with_pycocotools(tmp_path: Path) -> None:
    folder = sample_sources.coco(tmp_path / "set")
    source = coco.read(str(folder), {})
    true = COCO(str(folder / "annotations" / "instances_train2017.json"))
    for row in range(3):
        pixels = mask_pixels(annotated(source, row), HEIGHT, WIDTH)
        for number, annotation in enumerate(true.loadAnns(true.getAnnIds([row + 7]))):
            np.testing.assert_array_equal(pixels[number], true.annToMask(annotation))
            assert pixels[number].any()


def test_random_polygons_are_drawn_as_pycocotools_does(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    polygons = [
        [(random.random((random.integers(3, 12), 2)) * [WIDTH, HEIGHT]).ravel().tolist()]
        for _ in range(200)
    ]
    folder = sample_sources.coco(tmp_path / "set", splits=("train2017",), count=1)

    def edit(content: dict[str, Any]) -> None:
        row = content["annotations"][0]
        content["annotations"] = [{**row, "segmentation": each} for each in polygons]

    change(folder, edit)
    pixels = mask_pixels(annotated(coco.read(str(folder), {})), HEIGHT, WIDTH)
    for result, polygon in zip(pixels, polygons, strict=True):
        true = reference.merge(reference.frPyObjects(polygon, HEIGHT, WIDTH))
        np.testing.assert_array_equal(result, reference.decode(true))


def test_annotations_with_boxes_only_are_a_detection_set(tmp_path: Path) -> None:
    folder = sample_sources.coco(tmp_path / "set")
    assert coco.read(str(folder), {"task": "detection"}).task == "detection"
    assert annotated(coco.read(str(folder), {"task": "detection"})).masks is None
    for split in ("train2017", "val2017"):
        change(folder, lambda c: [row.pop("segmentation") for row in c["annotations"]], split)
    source = coco.read(str(folder), {})
    assert source.task == "detection"
    assert annotated(source).masks is None
    with pytest.raises(UsageError, match="task can't be 'keypoints'"):
        coco.read(str(folder), {"task": "keypoints"})


def test_a_missing_box_is_computed_from_the_mask(tmp_path: Path) -> None:
    folder = sample_sources.coco(tmp_path / "set")
    change(folder, lambda c: [row.pop("bbox") for row in c["annotations"]])
    result = annotated(coco.read(str(folder), {}))
    for box, pixels in zip(result.boxes, mask_pixels(result, HEIGHT, WIDTH), strict=True):
        rows, columns = np.nonzero(pixels)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bbox", [2, 3, 0, 4], "box without area"),
        ("bbox", [2, 3, -1, 4], "box inverted"),
        ("bbox", [-1, 3, 5, 4], "box outside the image"),
        ("bbox", [30, 3, 5, 4], "box outside the image"),
        ("bbox", [1, 3, 5], "unreadable annotation"),
        ("bbox", ["1", 3, 5, 4], "unreadable annotation"),
        ("bbox", [10**400, 3, 5, 4], "unreadable annotation"),
        ("bbox", {"x": 1}, "unreadable annotation"),
        ("category_id", 4, "unknown class"),
        ("category_id", -1, "unknown class"),
        ("category_id", "4", "unknown class"),
        ("category_id", [3], "unknown class"),
        ("category_id", None, "unknown class"),
        ("category_id", True, "unknown class"),
        ("iscrowd", 2, "unreadable annotation"),
        ("iscrowd", [0], "unreadable annotation"),
        ("segmentation", [[1, 2, 3, 4]], "unreadable mask"),
        ("segmentation", [[1, 2, 3, 4, 5, 6, 7]], "unreadable mask"),
        ("segmentation", [[1, 2, 3, 4, 5, "6"]], "unreadable mask"),
        ("segmentation", [1, 2, 3, 4, 5, 6], "unreadable mask"),
        ("segmentation", "text", "unreadable mask"),
        ("segmentation", [[1, 2, 3, 4, 99, 6]], "polygon outside the image"),
        ("segmentation", [[1, 2, 3, 4, 1e300, 6]], "polygon outside the image"),
        ("segmentation", [[1, 2, 1, 2, 1, 2]], "mask without pixels"),
        ("segmentation", {"size": [WIDTH, HEIGHT], "counts": [768]}, "mask of another size"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [768]}, "mask without pixels"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [700, 67]}, "unreadable mask"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [-1, 769]}, "unreadable mask"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [768.0]}, "unreadable mask"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [10**30]}, "unreadable mask"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": []}, "unreadable mask"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": "0\u00ff"}, "unreadable mask"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": "ppp"}, "unreadable mask"),
        ("segmentation", {"size": [HEIGHT, WIDTH]}, "unreadable mask"),
        ("segmentation", {"a": 1}, "mask of another size"),
    ],
)
def test_an_invalid_annotation_is_rejected_with_its_reason(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    folder = sample_sources.coco(tmp_path / "set")
    change(folder, lambda c: c["annotations"][1].update({field: value}))
    assert refused(folder).reason == message


@pytest.mark.fault(26)
def test_an_infinite_box_is_refused(tmp_path: Path) -> None:
    """1e999 is valid JSON, and infinite as a float."""
    folder = sample_sources.coco(tmp_path / "set")
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace("10.5", "1e999", 1))
    assert refused(folder).reason == "box not finite"


def test_rounded_coordinates_are_clipped_to_the_image(tmp_path: Path) -> None:
    folder = sample_sources.coco(tmp_path / "set")
    ring = [[-0.4, -0.3, WIDTH + 0.25, 0, WIDTH, HEIGHT + 0.5]]
    change(
        folder,
        lambda c: c["annotations"][0].update(
            bbox=[-0.4, 0, WIDTH + 0.8, HEIGHT + 0.5], segmentation=ring
        ),
    )
    result = annotated(coco.read(str(folder), {}))
    assert result.boxes[0].tolist() == [0, 0, WIDTH, HEIGHT]
    check(result, height=HEIGHT, width=WIDTH, classes=3, where="x")


def test_an_image_whose_size_differs_from_the_file_is_refused(tmp_path: Path) -> None:
    folder = sample_sources.coco(tmp_path / "set")
    change(folder, lambda c: c["images"][0].update(width=HEIGHT, height=WIDTH))
    assert refused(folder).reason == "annotation of another size"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda c: c.pop("images"), "no list of images"),
        (lambda c: c.update(annotations={}), "no list of annotations"),
        (lambda c: c["annotations"].append(1), "no list of annotations"),
        (lambda c: c["images"].append(c["images"][0]), "two images have the id 7"),
        (lambda c: c["images"][0].pop("file_name"), "has no id or no file_name"),
        (lambda c: c["images"][0].update(id=[1]), "has no id or no file_name"),
        (lambda c: c["categories"].append({"id": 3, "name": "x"}), "two categories have the id 3"),
        (
            lambda c: (
                c["categories"].append({"id": 4, "name": "dog"}),
                c["annotations"][0].update(category_id=4),
            ),
            "two with the same name",
        ),
        (lambda c: c["categories"].append({"id": [4], "name": "x"}), "has no id or no name"),
        (lambda c: c["categories"].clear(), "no categories"),
    ],
)
def test_a_file_that_is_not_coco_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], reason: str
) -> None:
    folder = sample_sources.coco(tmp_path / "set")
    change(folder, edit)
    with pytest.raises(TesseraError, match=reason) as caught:
        coco.read(str(folder), {})
    assert "instances_" in caught.value.message


def test_images_that_are_missing_or_outside_the_source_are_refused(tmp_path: Path) -> None:
    folder = sample_sources.coco(tmp_path / "set", count=5)
    sample_sources.image(tmp_path / "secret.jpg")
    (folder / "train2017" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    names = ["none.jpg", "../../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "a\0b"]
    change(folder, lambda c: [i.update(file_name=n) for i, n in zip(c["images"], names)])
    source = coco.read(
        str(folder), {"images": "train2017", "train": "annotations/instances_train2017.json"}
    )
    problems = [item.problem[0] if item.problem else "" for item in source.items]
    outside = "path outside the source"
    assert problems == ["missing image", outside, outside, "", outside]
    with pytest.raises(TesseraError, match="is outside"):
        source.load(source.items[3])
    for item in source.items[1:3]:
        with pytest.raises(TesseraError, match="is outside"):
            source.load(item)


def test_files_can_be_set_by_options(tmp_path: Path) -> None:
    folder = sample_sources.coco(tmp_path / "set", splits=("a", "b"))
    options = {
        split: f"annotations/instances_{name}.json"
        for split, name in (("train", "a"), ("test", "b"))
    }
    source = coco.read(str(folder), options)
    assert Counter(item.split for item in source.items) == {"train": 3, "test": 3}
    assert not any(item.problem for item in source.items)
    with pytest.raises(UsageError, match="there is no file"):
        coco.read(str(folder), {"train": "annotations/none.json"})
    with pytest.raises(UsageError, match="there is no folder"):
        coco.read(str(folder), {"images": "nowhere"})


def test_roboflow_s_layout_is_read(tmp_path: Path) -> None:
    sample_sources.coco(tmp_path / "made")
    for split, old in (("train", "train2017"), ("valid", "val2017")):
        target = tmp_path / "set" / split
        target.parent.mkdir(exist_ok=True)
        (tmp_path / "made" / old).rename(target)
        old_json = tmp_path / "made" / "annotations" / f"instances_{old}.json"
        old_json.rename(target / "_annotations.coco.json")
    assert coco.recognises(str(tmp_path / "set"))
    source = coco.read(str(tmp_path / "set"), {})
    assert Counter(item.split for item in source.items) == {"train": 3, "val": 3}
    assert source.items[0].origin == "train/000000.jpg"
    assert not any(item.problem for item in source.items)


@pytest.mark.fault(29)
def test_an_image_without_objects_is_a_negative(tmp_path: Path) -> None:
    folder = sample_sources.coco(tmp_path / "set")

    def edit(content: dict[str, Any]) -> None:
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] != 7]

    change(folder, edit)
    result = annotated(coco.read(str(folder), {}))
    assert (result.boxes.shape, result.masks) == ((0, 4), ())
    check(result, height=HEIGHT, width=WIDTH, classes=3, where="x")


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = sample_sources.DATA / "dsb2018-fluorescence"
    if not data.is_dir():
        pytest.skip("the nuclei are not here")
    folder = tmp_path_factory.mktemp("dsb2018")
    with tarfile.open(data / "dsb2018-fluorescence.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    for path in data.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.e2e
@pytest.mark.slow
def test_the_real_nuclei_have_the_documented_counts_and_masks(nuclei: Path) -> None:
    """The counts are those of the set's SOURCE.md; masks and areas agree with pycocotools."""
    source = coco.read(str(nuclei), {})
    assert (source.task, source.classes) == ("instance_segmentation", ("nucleus",))
    assert Counter(item.split for item in source.items) == {"train": 170, "val": 50}
    objects: Counter[str | None] = Counter()
    for at, item in enumerate(source.items):
        result = annotated(source, at)
        check(result, height=256, width=256, classes=1, where=item.origin)
        objects[item.split] += len(result.boxes)
        assert encode(result)[0] == "json"
        if at % 10:
            continue
        content = json.loads((nuclei / f"instances_{item.split}.json").read_text())
        number = next(i["id"] for i in content["images"] if i["file_name"] == item.origin)
        rows = [row for row in content["annotations"] if row["image_id"] == number]
        pixels = mask_pixels(result, 256, 256)
        for row, mask, text in zip(rows, pixels, result.masks or (), strict=True):
            true = reference.frPyObjects(row["segmentation"], 256, 256)
            np.testing.assert_array_equal(mask, reference.decode(true))
            area = rle.area(rle.parse(text, 256, 256))
            assert area == row["area"] == reference.area(true)
    assert objects == {"train": 4744, "val": 1406}
