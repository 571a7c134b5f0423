"""A mask file for each object."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_sources
from PIL import Image
from sample_sources import HEIGHT, WIDTH

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
