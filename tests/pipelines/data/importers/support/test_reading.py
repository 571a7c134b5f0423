"""Paths stay in their source, and the header has the size of the decoded image."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sample_sources
from PIL import Image

from models.core.errors import TesseraError, UsageError
from pipelines.data.images import open_image
from pipelines.data.importers.support.reading import (
    are_classes_in_names,
    check_stated_size,
    choose,
    class_in_name,
    find_problem,
    find_splits,
    image_size,
    list_stems,
    locate,
    nearby,
    split_of,
)
from pipelines.data.sample_error import SampleError


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_from_the_header_is_that_of_the_upright_image(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(sample_sources.noise(0)).save(out, format=form, exif=exif)
    true = open_image(out.getvalue(), "x").size[::-1]
    assert image_size(out.getvalue(), "x") == true
    assert true == (
        (sample_sources.WIDTH, sample_sources.HEIGHT)
        if orientation > 4
        else (sample_sources.HEIGHT, sample_sources.WIDTH)
    )


@pytest.mark.parametrize("data", [b"", b"%!PS-Adobe", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_not_an_image_has_no_size(data: bytes) -> None:
    with pytest.raises(TesseraError, match=r"^x\.jpg"):
        image_size(data, "x.jpg")


def test_paths_stay_in_the_source(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    secret = sample_sources.image(tmp_path / "secret.jpg")
    sample_sources.image(folder / "a" / "1.jpg")
    (folder / "link.jpg").symlink_to(secret)
    (folder / "inner.jpg").symlink_to(folder / "a" / "1.jpg")
    (folder / "out").symlink_to(tmp_path)
    for name in ("a/1.jpg", "inner.jpg", "./a/1.jpg"):
        assert locate(folder, name).is_file()
        assert find_problem(folder, name) is None
    for name in ("../secret.jpg", "a/../../secret.jpg", str(secret), "..\\secret.jpg", "", "a\0"):
        with pytest.raises(SampleError, match="is outside"):
            locate(folder, name)
        assert (find_problem(folder, name) or [""])[0] == "path outside the source"
    for name in ("link.jpg", "out/secret.jpg"):
        assert (folder / name).read_bytes() == secret.read_bytes()  # the control
        with pytest.raises(SampleError, match="is outside"):
            locate(folder, name)
    # A source that is itself behind a link is the user's own doing.
    (tmp_path / "alias").symlink_to(folder)
    assert locate(tmp_path / "alias", "a/1.jpg").is_file()


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train TRAIN Train2017 training Training training_set train_images trainset"),
        ("train", "seg_train stage1_train trainImages TrainingSet images-train train_1 imgs.train"),
        ("val", "val valid validation Validation dev eval valset val_images 2017_val"),
        ("test", "test test-1 Testing TEST_SET tst testdata test.images"),
        (None, "x contest train_station testtube trainer validity trainval train_val train犬 set"),
    ],
)
def test_splits_are_recognised_by_folder_names(split: str | None, names: str) -> None:
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


def test_names_that_differ_in_the_split_only_are_splits() -> None:
    assert find_splits(["flowers-train", "flowers_test", "Train", "other"]) == {
        "flowers-train": "train",
        "flowers_test": "test",
        "Train": "train",
    }
    assert find_splits(["night_train", "day_train", "test_tube"]) == {}
    assert find_splits(["bird_test", "bird_eval"]) == {}  # without train they may be classes


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ("cat.0.jpg cat.1.jpg dog.0.jpg dog.1.jpg", "cat dog"),
        ("big_cat_1.jpg big_cat_2.jpg dog-3.jpg a/dog-4.jpg", "big_cat dog"),
        ("IMG_1.jpg IMG_2.jpg", ""),
        ("1.jpg 2.jpg 3x4.jpg", ""),
        ("baby.png bird.png woman.png", ""),
        ("cat1.jpg cat2.jpg dog1.jpg", ""),  # one alone is no class
    ],
)
def test_classes_in_the_names_of_images(names: str, classes: str) -> None:
    assert are_classes_in_names(names.split()) == bool(classes)
    if classes:
        assert {class_in_name(name) for name in names.split()} == set(classes.split())


def test_folders_nearby_and_stems(tmp_path: Path) -> None:
    for name in ("a/b/c/1.jpg", "a/2.png", "a/2.jpg", "a/.3.jpg", "a/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert nearby(str(tmp_path)) == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    assert nearby(str(tmp_path / "nowhere")) == []
    assert list_stems(tmp_path / "a") == {"2": "2.jpg"}
    for number in range(65):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
    assert nearby(str(tmp_path / "many")) == [tmp_path / "many"]


def test_options_and_sizes_are_checked() -> None:
    assert choose({}, "task", ("a", "b"), "b") == "b"
    with pytest.raises(UsageError, match=r"the option task can't be 'c'\. allowed: a, b"):
        choose({"task": "c"}, "task", ("a", "b"), "b")
    check_stated_size((3, 4), (3, 4), "x")
    with pytest.raises(SampleError, match="an image 3 wide and 4 high, the image is 4 wide"):
        check_stated_size((4, 3), (3, 4), "x")
