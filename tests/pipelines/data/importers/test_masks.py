"""Masks of classes: the meaning of their values, and the mask of each image."""

from __future__ import annotations

import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sample_sources
from layouts.base import picture
from layouts.pixels import mask as write_mask
from layouts.pixels import regions
from PIL import Image
from sample_sources import HEIGHT, WIDTH

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import (
    IGNORED,
    Mask,
    check,
    count,
)
from pipelines.data.images import open_image
from pipelines.data.importers import image_folder, masks
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import AmbiguousError, Source


def pixels_of(source: Source, row: int = 0) -> np.ndarray:
    assert source.annotate is not None
    result = source.annotate(source.items[row])
    assert isinstance(result, Mask)
    check(result, height=HEIGHT, width=WIDTH, classes=len(source.classes), where="x")
    return result.pixels


def mask_file(folder: Path, number: int = 0) -> np.ndarray:
    with Image.open(folder / "masks" / f"{number}.png") as image:
        return np.asarray(image)


def test_masks_of_0_and_255_are_binary(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    assert masks.recognises(str(folder)) == "images in images with masks in masks"
    source = masks.read(str(folder), {})
    assert (source.task, source.classes) == ("semantic_segmentation", ("background", "foreground"))
    assert source.notes == ("masks of 0 and 255: 0 is background, 255 is foreground",)
    for row in range(3):
        np.testing.assert_array_equal(pixels_of(source, row), mask_file(folder, row) // 255)
    assert [path.name for path in source.files(source.items[1])] == ["1.jpg", "1.png"]
    assert source.load(source.items[1]) == (folder / "images" / "1.jpg").read_bytes()
    assert masks.read(str(folder), {"classes": "out,in"}).classes == ("out", "in")


def test_one_bit_masks_are_binary(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    for number in range(3):
        Image.fromarray(mask_file(folder, number) > 0).save(folder / "masks" / f"{number}.png")
    source = masks.read(str(folder), {})
    assert source.classes == ("background", "foreground")
    np.testing.assert_array_equal(pixels_of(source), mask_file(folder).astype(np.uint8))


def test_other_grey_values_are_classes_and_255_is_ignored(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set", values=(0, 1, 4, 255))
    source = masks.read(str(folder), {})
    assert source.classes == ("0", "1", "2", "3", "4")
    np.testing.assert_array_equal(pixels_of(source), mask_file(folder))
    named = masks.read(str(folder), {"classes": "a,b,c,d,e,f"})
    assert named.classes == tuple("abcdef")
    with pytest.raises(UsageError, match="value 4, but 2 classes are named"):
        masks.read(str(folder), {"classes": "a,b"})


def test_the_entries_of_a_palette_are_classes(tmp_path: Path) -> None:
    """Reading it as an image would turn the entries into colours."""
    folder = sample_sources.masks(tmp_path / "set", values=(0, 1, 15, 255))
    for number in range(3):
        image = Image.fromarray(mask_file(folder, number))
        image = image.convert("P")
        image.putdata(mask_file(folder, number).ravel().tolist())
        image.putpalette([(7 * value) % 256 for value in range(768)])
        image.save(folder / "masks" / f"{number}.png")
        with Image.open(folder / "masks" / f"{number}.png") as saved:
            assert saved.mode == "P"
    source = masks.read(str(folder), {})
    assert len(source.classes) == 16
    np.testing.assert_array_equal(pixels_of(source), mask_file(folder))
    assert set(np.unique(pixels_of(source))) == {0, 1, 15, IGNORED}


COLOURS = np.array([[128, 64, 128], [70, 130, 180], [0, 0, 0]], np.uint8)


def colour(folder: Path, mode: str = "RGB") -> list[np.ndarray]:
    """Replaces the values of the masks with colours; returns the values."""
    values = []
    for number in range(3):
        values.append(mask_file(folder, number))
        image = Image.fromarray(COLOURS[values[-1]]).convert(mode)
        image.save(folder / "masks" / f"{number}.png")
    return values


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_numbered_or_named(tmp_path: Path, mode: str) -> None:
    folder = sample_sources.masks(tmp_path / "set", values=(0, 1, 2))
    values = colour(folder, mode)
    source = masks.read(str(folder), {})
    assert source.classes == ("#000000", "#4682b4", "#804080")
    np.testing.assert_array_equal(pixels_of(source), 2 - values[0])
    told = masks.read(str(folder), {"colours": "road=#804080, sky=4682B4, ignored=#000000"})
    assert told.classes == ("road", "sky")
    np.testing.assert_array_equal(pixels_of(told), np.where(values[0] == 2, IGNORED, values[0]))
    lacking = masks.read(str(folder), {"colours": "road=#804080,sky=#4682b4"})
    with pytest.raises(SampleError, match=r"masks/0\.png has the value #000000"):
        pixels_of(lacking)
    with pytest.raises(UsageError, match="3 colours, but 2 classes"):
        masks.read(str(folder), {"classes": "a,b"})


@pytest.mark.parametrize(
    "text", ["road", "road=#12", "=#123456", "a=#123456,a=#123457", "a=#123456,b=#123456", "", ","]
)
def test_invalid_colours_are_refused(tmp_path: Path, text: str) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    with pytest.raises(UsageError, match="the option colours"):
        masks.read(str(folder), {"colours": text})


def test_grey_in_three_channels_is_grey(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    true = mask_file(folder) // 255
    for number in range(3):
        sample_sources.save(
            folder / "masks" / f"{number}.png", mask_file(folder, number)[..., None].repeat(3, 2)
        )
    np.testing.assert_array_equal(pixels_of(masks.read(str(folder), {})), true)


def test_images_that_are_not_masks_are_refused(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    sample_sources.save(folder / "masks" / "0.png", sample_sources.noise(0))
    with pytest.raises(TesseraError, match="too many for classes"):
        masks.read(str(folder), {})
    sample_sources.save(
        folder / "masks" / "0.png", (sample_sources.noise(0, channels=1).astype(np.uint16) + 300)
    )
    with pytest.raises(TesseraError, match="values"):
        masks.read(str(folder), {})


def test_jpeg_masks_are_refused(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    sample_sources.save(
        folder / "masks" / "0.png", sample_sources.noise(0, channels=1), format="JPEG"
    )
    source = masks.read(str(folder), {})
    with pytest.raises(SampleError, match="is a JPEG file"):
        pixels_of(source)


def test_a_mask_of_another_size_or_with_an_unknown_value_is_refused(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    source = masks.read(str(folder), {})
    sample_sources.save(folder / "masks" / "0.png", mask_file(folder).T.copy())
    with pytest.raises(SampleError, match=r"masks/0\.png: the mask is 32 by 24") as caught:
        pixels_of(source)
    assert caught.value.reason == "mask of another size"
    sample_sources.save(folder / "masks" / "0.png", np.full((HEIGHT, WIDTH), 7, np.uint8))
    with pytest.raises(SampleError, match="the value 7, which is not a class"):
        pixels_of(source)
    (folder / "masks" / "0.png").write_bytes(b"\x89PNG")
    with pytest.raises(TesseraError, match=r"masks/0\.png"):
        pixels_of(source)


@pytest.mark.fault(8)
def test_an_image_without_a_mask_is_refused(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    (folder / "masks" / "1.png").unlink()
    source = masks.read(str(folder), {})
    assert [item.origin for item in source.items if item.problem] == ["images/1.jpg"]
    assert len(source.items) == 3


LAYOUTS = {
    "{split}/images/{name}.jpg": "{split}/masks/{name}.png",
    "images/{split}/{name}.jpg": "masks/{split}/{name}.png",
    "{split}/image/{name}.jpg": "{split}/label/{name}_mask.png",
    "{split}/{name}.jpg": "{split}/{name}_mask.png",
}


@pytest.mark.parametrize("images", list(LAYOUTS))
@pytest.mark.parametrize("around", ["", "set"])
def test_layouts_with_splits_are_read(tmp_path: Path, images: str, around: str) -> None:
    for seed, split in enumerate(("train", "valid")):
        for name in ("a", "b"):
            sample_sources.image(tmp_path / around / images.format(split=split, name=name), seed)
            path = tmp_path / around / LAYOUTS[images].format(split=split, name=name)
            sample_sources.save(path, np.full((HEIGHT, WIDTH), 255 * seed, np.uint8))
    assert masks.recognises(str(tmp_path))
    source = masks.read(str(tmp_path), {})
    assert Counter(item.split for item in source.items) == {"train": 2, "val": 2}
    assert len({item.key for item in source.items}) == 4
    for row, item in enumerate(source.items):
        assert (pixels_of(source, row) == (item.split == "val")).all()
    told = masks.read(str(tmp_path), {"split": "test"})
    assert {item.split for item in told.items} == {"test"}


def test_folders_of_photos_called_mask_are_no_masks(tmp_path: Path) -> None:
    """People with and without a face mask: the same names in both folders."""
    for seed in range(4):
        for name in ("mask", "no_mask"):
            picture(tmp_path / name / f"{seed // 2}.jpg", seed, width=64, height=48)
    assert not masks.recognises(str(tmp_path))
    assert image_folder.recognises(str(tmp_path)) == "2 class folders"


def test_two_folders_of_masks_are_asked_about(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    shutil.copytree(folder / "masks", folder / "labels")
    with pytest.raises(AmbiguousError, match="masks in labels and in masks") as caught:
        masks.read(str(folder), {})
    assert [r.options for r in caught.value.readings] == [{"masks": "labels"}, {"masks": "masks"}]
    assert len(masks.read(str(folder), {"masks": "labels"}).items) == 3


def test_a_suffix_that_is_not_found_can_be_given(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    for number in range(3):
        (folder / "masks" / f"{number}.png").rename(folder / "masks" / f"{number}truth.png")
    with pytest.raises(TesseraError, match="no mask has the name of an image") as caught:
        masks.read(str(folder), {})
    assert "--option mask_suffix=" in (caught.value.hint or "")
    found = masks.read(str(folder), {"mask_suffix": "truth"})
    assert not any(item.problem for item in found.items)


def test_jpeg_masks_alone_say_why_and_what_helps(tmp_path: Path) -> None:
    folder = sample_sources.masks(tmp_path / "set")
    true = mask_file(folder) // 255
    for number in range(3):
        pixels = mask_file(folder, number)
        sample_sources.save(folder / "masks" / f"{number}.png", pixels, format="JPEG", quality=95)
    assert masks.recognises(str(folder))
    with pytest.raises(TesseraError, match=r"JPEG file.*--option threshold=128"):
        masks.read(str(folder), {})
    source = masks.read(str(folder), {"threshold": "128", "classes": "out,in"})
    assert source.classes == ("out", "in")
    assert (pixels_of(source) == true).mean() > 0.95
    with pytest.raises(UsageError, match="the option threshold can't be '0'"):
        masks.read(str(folder), {"threshold": "0"})
    with pytest.raises(UsageError, match="values and threshold don't go together"):
        masks.read(str(folder), {"threshold": "9", "values": "a=0"})


@pytest.mark.parametrize("orientation", range(2, 9))
def test_masks_of_the_stored_pixels_are_turned_on_request(tmp_path: Path, orientation: int) -> None:
    """A mask that was painted before a camera's orientation was applied."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = regions(1, 3)
    (tmp_path / "images").mkdir()
    image = Image.fromarray(stored * np.uint8(100))
    image.convert("RGB").save(tmp_path / "images" / "0.png", exif=exif)
    write_mask(tmp_path / "masks" / "0.png", stored)
    source = masks.read(str(tmp_path), {"exif": "stored"})
    assert source.annotate is not None
    found = source.annotate(source.items[0])
    assert isinstance(found, Mask)
    upright = np.asarray(open_image(source.load(source.items[0]), "x"))[..., 0] // 100
    np.testing.assert_array_equal(found.pixels, upright)
    plain = masks.read(str(tmp_path), {})
    assert plain.annotate is not None
    if orientation >= 5:
        with pytest.raises(SampleError, match="--option exif=stored"):
            plain.annotate(plain.items[0])


def test_the_real_membranes_have_the_documented_counts(tmp_path: Path) -> None:
    """The counts are those of the set's SOURCE.md."""
    archive = sample_sources.DATA / "isbi-membrane" / "membrane.tar"
    if not archive.is_file():
        pytest.skip("the membranes are not here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    source = masks.read(str(tmp_path), {})
    assert (source.classes, len(source.items)) == (("background", "foreground"), 30)
    total = np.zeros(2)
    for item in source.items:
        assert source.annotate is not None
        result = source.annotate(item)
        check(result, height=512, width=512, classes=2, where=item.origin)
        total += count(result, 2)
    np.testing.assert_allclose(total / total.sum(), [0.220, 0.780], atol=5e-4)
