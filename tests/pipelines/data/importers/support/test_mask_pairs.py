"""Which image belongs to which mask, by the names of folders and files."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from layouts.base import picture

from pipelines.data.importers.support.mask_pairs import (
    find_mask_folders,
    names_masks,
    rivals,
)


def found(folder: Path, *paths: str) -> list[tuple[str, str]]:
    """The pairs in a folder of these files."""
    for seed, path in enumerate(paths):
        picture(folder / path, seed)
    return [
        (
            (one.images / image).relative_to(folder).as_posix(),
            (one.masks / mask).relative_to(folder).as_posix(),
        )
        for one in find_mask_folders(str(folder))
        for image, mask in one.pairs
    ]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{}.jpg", "masks/{}.png"),
        ("imgs/{}.jpg", "gt/{}.png"),
        ("train/{}.png", "trainannot/{}.png"),
        ("train/{}.jpg", "train_masks/{}_mask.gif"),
        ("JPEGImages/{}.jpg", "SegmentationClassContext/{}.png"),
        ("701_StillsRaw_full/{}.png", "LabeledApproved_full/{}_L.png"),
        ("ISIC_Training_Input/{}.jpg", "ISIC_Training_GroundTruth/{}_segmentation.png"),
        ("training/images/{}_training.tif", "training/1st_manual/{}_manual1.gif"),
        ("images/{}_sat.jpg", "masks/{}_mask.png"),
        ("images/{}.jpg", "masks/mask_{}.png"),
        ("images/{}.jpg", "masks/{}.lesion-3.png"),
        ("deep/er/images/{}.jpg", "deep/er/labels/{}.png"),
        ("images/a/b/{}.jpg", "masks/{}.png"),
        ("{}.jpg", "{}_mask.png"),
        ("{}.jpg", "{}.png"),
    ],
)
def test_a_mask_is_found_by_the_name_of_its_image(tmp_path: Path, image: str, mask: str) -> None:
    names = ("x1", "x10", "x2", "x20")  # a name may begin with another
    expected = sorted((image.format(name), mask.format(name)) for name in names)
    assert sorted(found(tmp_path, *(p for pair in expected for p in pair))) == expected


def test_names_that_share_no_suffix_are_no_pairs(tmp_path: Path) -> None:
    """The control of the test above."""
    assert not found(tmp_path, "images/a.jpg", "masks/b.png", "images/c.jpg", "masks/d.png")


def test_the_two_forms_of_an_accent_are_one_name(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert len(found(tmp_path, f"images/{composed}.jpg", f"masks/{decomposed}.png")) == 1


def test_masks_of_one_split_have_images_of_that_split(tmp_path: Path) -> None:
    """All splits have the same names."""
    paths = [f"{split}{kind}/0.png" for split in ("train", "val") for kind in ("", "_masks")]
    assert found(tmp_path, *paths) == [
        ("train/0.png", "train_masks/0.png"),
        ("val/0.png", "val_masks/0.png"),
    ]
    assert [one.split for one in find_mask_folders(str(tmp_path))] == ["train", "val"]


def test_a_name_that_repeats_in_other_folders_is_no_match(tmp_path: Path) -> None:
    paths = ["images/a/0.jpg", "images/b/0.jpg", "masks/c/0.png", "masks/d/0.png"]
    assert not found(tmp_path, *paths)


def test_two_folders_of_masks_for_one_of_images_are_rivals(tmp_path: Path) -> None:
    found(tmp_path, "images/0.jpg", "masks/0.png", "labels/0.png")
    assert len(rivals(find_mask_folders(str(tmp_path)))) == 2
    (tmp_path / "labels" / "0.png").unlink()
    assert not rivals(find_mask_folders(str(tmp_path)))


def test_folders_that_number_objects_are_found_on_request(tmp_path: Path) -> None:
    found(tmp_path, "JPEGImages/0.jpg", "SegmentationObject/0.png", "SegmentationClass/0.png")
    (classes,) = find_mask_folders(str(tmp_path))
    (objects,) = find_mask_folders(str(tmp_path), of_objects=True)
    assert (classes.masks.name, objects.masks.name) == ("SegmentationClass", "SegmentationObject")


@pytest.mark.parametrize("name", ["masks", "trainannot", "Train Labels", "gtFine", "y_gt", "GT"])
def test_words_that_mean_masks(name: str) -> None:
    assert names_masks(name)


@pytest.mark.parametrize("name", ["images", "train", "damask", "cannot", "instances", "label1up"])
def test_words_that_do_not(name: str) -> None:
    assert names_masks(name) == (name == "label1up")
