"""A mask file for each object."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_sources
from layouts import pixels as layouts
from layouts.base import picture
from PIL import Image
from sample_sources import HEIGHT, WIDTH

from models.core.errors import UsageError
from pipelines.data.annotations import (
    Objects,
    check,
    mask_pixels,
)
from pipelines.data.importers import instance_masks, masks
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Source


def objects_of(source: Source, row: int = 0) -> Objects:
    assert source.annotate is not None
    result = source.annotate(source.items[row])
    assert isinstance(result, Objects)
    return result


def test_a_mask_file_for_each_object_is_read(tmp_path: Path) -> None:
    folder = sample_sources.instance_masks(tmp_path / "set")
    assert instance_masks.recognises(str(folder))
    assert not masks.recognises(str(folder))
    source = instance_masks.read(str(folder), {})
    assert (source.task, source.classes) == ("instance_segmentation", ("object",))
    assert [item.key for item in source.items] == ["id0", "id1", "id2"]
    result = objects_of(source, 1)
    check(result, height=HEIGHT, width=WIDTH, classes=1, where="x")
    assert result.boxes.tolist() == [[3, 2, 11, 8], [3, 3, 11, 9]]
    pixels = mask_pixels(result, HEIGHT, WIDTH)
    for number in range(2):
        with Image.open(folder / "id1" / "masks" / f"m{number}.png") as image:
            np.testing.assert_array_equal(pixels[number], np.asarray(image) // 255)
    assert [p.name for p in source.files(source.items[1])] == ["id1.png", "m0.png", "m1.png"]
    assert instance_masks.read(str(folder), {"class": "nucleus"}).classes == ("nucleus",)


def test_an_image_without_masks_is_a_negative_and_invalid_masks_are_refused(tmp_path: Path) -> None:
    folder = sample_sources.instance_masks(tmp_path / "stage1_train")
    for path in (folder / "id0" / "masks").iterdir():
        path.unlink()
    (folder / "id1" / "images" / "id1.png").unlink()
    sample_sources.save(folder / "id2" / "masks" / "m0.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    source = instance_masks.read(str(tmp_path), {})
    assert {item.split for item in source.items} == {"train"}
    assert len(objects_of(source, 0).boxes) == 0
    assert [bool(item.problem) for item in source.items] == [False, True, False]
    with pytest.raises(SampleError, match=r"m0\.png has no pixel other than 0"):
        objects_of(source, 2)


def test_a_mask_with_the_area_but_not_the_shape_of_the_image_is_refused(tmp_path: Path) -> None:
    """Its run lengths alone would be valid: their sum is right."""
    folder = sample_sources.instance_masks(tmp_path / "set")
    sample_sources.save(folder / "id0" / "masks" / "m0.png", np.ones((WIDTH, HEIGHT), np.uint8))
    with pytest.raises(SampleError, match=r"m0\.png: the mask is 32 by 24"):
        objects_of(instance_masks.read(str(folder), {}))


VALUES = {"8 bits": (0, 3, 200), "16 bits": (0, 3, 40_000), "32 bits": (0, 3, 2_000_000)}


@pytest.mark.parametrize("kind", [*VALUES, "palette", "colours"])
def test_every_encoding_of_numbers_gives_the_same_objects(tmp_path: Path, kind: str) -> None:
    pixels = layouts.regions(0, 3)
    suffix = ".tif" if kind == "32 bits" else ".png"
    path = tmp_path / f"masks/0{suffix}"
    picture(tmp_path / "images/0.jpg")
    if kind == "palette":
        layouts.mask(path, pixels, palette=layouts.voc_palette())
    elif kind == "colours":
        layouts.mask(path, np.array([[0, 0, 0], [0, 0, 9], [9, 0, 0]], np.uint8)[pixels])
    else:
        dtype = {"8 bits": np.uint8, "16 bits": np.uint16, "32 bits": np.int32}[kind]
        layouts.mask(path, np.array(VALUES[kind], dtype)[pixels])
    source = instance_masks.read(str(tmp_path), {})
    found = objects_of(source)
    check(found, height=16, width=24, classes=1, where="x")
    got = mask_pixels(found, 16, 24)
    np.testing.assert_array_equal(got, np.stack([pixels == 1, pixels == 2]))


def test_vocs_border_is_no_object_and_other_values_can_be_ignored(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages/0.jpg")
    path = tmp_path / "SegmentationObject/0.png"
    pixels = np.array([0, 1, 255], np.uint8)[layouts.regions(0, 3)]
    layouts.mask(path, pixels, palette=layouts.voc_palette())
    assert len(objects_of(instance_masks.read(str(tmp_path), {})).boxes) == 1
    layouts.mask(path, pixels)  # the control: without the palette 255 is a number
    assert len(objects_of(instance_masks.read(str(tmp_path), {})).boxes) == 2
    assert len(objects_of(instance_masks.read(str(tmp_path), {"ignore": "255"})).boxes) == 1


def test_a_divisor_separates_class_and_number(tmp_path: Path) -> None:
    layouts.panoptic_ids(tmp_path)
    source = instance_masks.read(str(tmp_path), {"divisor": "1000", "classes": "person,car"})
    assert source.classes == ("person", "car")
    assert sorted(objects_of(source).labels.tolist()) == [0, 1, 1]
    whole = instance_masks.read(str(tmp_path), {})
    assert len(objects_of(whole).boxes) == 4  # the control: each value is an object
    with pytest.raises(UsageError, match="the classes 24, 26, 1 are named"):
        instance_masks.read(str(tmp_path), {"divisor": "1000", "classes": "person"})


@pytest.mark.parametrize(
    "options", [{"divisor": "1"}, {"divisor": "x"}, {"ignore": "red"}, {"classes": "a,b"}]
)
def test_invalid_options_are_refused(tmp_path: Path, options: dict[str, str]) -> None:
    layouts.panoptic_ids(tmp_path)
    with pytest.raises(UsageError, match=f"{next(iter(options))}"):
        instance_masks.read(str(tmp_path), options)


@pytest.mark.e2e
@pytest.mark.slow
def test_the_real_nuclei_have_the_documented_counts(tmp_path: Path) -> None:
    """The counts are those of the set's SOURCE.md, which also describes its val split."""
    archive = sample_sources.DATA / "dsb2018-fluorescence" / "dsb2018-fluorescence.tar.gz"
    if not archive.is_file():
        pytest.skip("the nuclei are not here")
    import hashlib

    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    source = instance_masks.read(str(tmp_path), {})
    images: Counter[str] = Counter()
    objects: Counter[str] = Counter()
    areas: list[Any] = []
    for row, item in enumerate(source.items):
        name = Path(item.origin).parts[1]
        split = "train" if int(hashlib.sha1(name.encode()).hexdigest(), 16) % 5 else "val"
        result = objects_of(source, row)
        images[split] += 1
        objects[split] += len(result.boxes)
        areas += mask_pixels(result, 256, 256).sum((1, 2)).tolist()
    assert images == {"train": 170, "val": 50}
    assert objects == {"train": 4744, "val": 1406}
    assert (min(areas), max(areas)) == (21, 1591)
