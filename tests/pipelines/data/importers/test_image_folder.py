"""A folder for each class, optionally in folders for the splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.data.packing.formats import recognise
from pipelines.data.packing.pack import pack

MakeFolder = Callable[..., Path]


MakeImage = Callable[..., Path]


def left_behind(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if "packing" in p.name or p.name == "out"]


def test_images_without_class_folders_are_without_labels(
    tmp_path: Path, make_image: MakeImage
) -> None:
    make_image(tmp_path / "src" / "1.jpg")
    assert recognise(str(tmp_path / "src")) == ("images", "images without labels")
    with pytest.raises(TesseraError, match="is in no class folder"):
        pack(str(tmp_path / "src"), tmp_path / "out", format="image_folder")


@pytest.mark.parametrize("stray", ["1.jpg", "train/1.jpg", "other/cat/1.jpg"])
def test_images_next_to_the_class_folders_are_refused(
    tmp_path: Path, make_folder: MakeFolder, make_image: MakeImage, stray: str
) -> None:
    source = make_folder(tmp_path / "pets", ["train/cat", "train/dog"], 3)
    make_image(source / stray)
    with pytest.raises(TesseraError, match=f"the image {stray} is in no class folder"):
        pack(str(source), tmp_path / "out")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("folder", ["bird", "train/bird", "test/cat"])
def test_an_empty_class_folder_is_refused(
    tmp_path: Path, make_folder: MakeFolder, folder: str
) -> None:
    splits = "/" in folder
    folders = ["train/cat", "train/dog", "test/dog"] if splits else ["cat", "dog"]
    source = make_folder(tmp_path / "pets", folders, 3)
    (source / folder).mkdir()
    with pytest.raises(TesseraError, match=f"the class folder {folder} has no images"):
        pack(str(source), tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_folder_of_classes_called_test_is_a_class(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    card = pack(str(make_folder(tmp_path / "x", ["test", "other"], 4)), tmp_path / "out")
    assert card.classes == ("other", "test")


def test_two_folders_for_one_split_are_refused(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "x", ["train/a", "val/a", "valid/a"], 3)
    with pytest.raises(TesseraError, match="two folders for val"):
        pack(str(source), tmp_path / "out")


def test_hidden_files_are_skipped_and_others_counted(
    tmp_path: Path, make_folder: MakeFolder, make_image: MakeImage
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 4)
    make_image(source / ".cache" / "1.jpg")
    make_image(source / "cat" / "deep" / "down" / "1.jpg", seed=99)
    (source / "cat" / ".DS_Store").write_text("x")
    (source / "README.txt").write_text("x")
    (source / "dog" / "loop").symlink_to(source)
    messages: list[str] = []
    with pytest.raises(TesseraError, match=r"in the source twice, by a link: dog/loop"):
        pack(str(source), tmp_path / "out")
    to = tmp_path / "out"
    card = pack(str(source), to, allow_unused=["dog/loop"], notify=messages.append)
    assert sum(split.samples for split in card.splits.values()) == 9
    assert messages[0] == f"reading {source} as image_folder: 2 class folders"
    assert "files: 13 = 9 images + 3 documents + 1 left out by --allow-unused" in messages


def test_hidden_pictures_are_not_passed_over(
    tmp_path: Path, make_folder: MakeFolder, make_image: MakeImage
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 4)
    make_image(source / "cat" / ".more" / "1.jpg")
    with pytest.raises(
        TesseraError, match=r"1 picture: 1 \.jpg in cat/\.more \(cat/\.more/1\.jpg\)"
    ):
        pack(str(source), tmp_path / "out")


def test_a_single_class_folder_is_packed_without_classes(
    tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    messages: list[str] = []
    pack(str(make_folder(tmp_path / "src", ["cat"])), tmp_path / "out", notify=messages.append)
    assert any(
        "all are in cat: with a single folder there are no classes" in line for line in messages
    )


CAFE, CAFE_APART = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("splits", ["", "train/"])
def test_class_folders_in_two_unicode_forms_are_one_class(
    tmp_path: Path, make_folder: MakeFolder, splits: str
) -> None:
    folders = [splits + name for name in (CAFE, CAFE_APART, "tea")]
    source = make_folder(tmp_path / "cups", folders, 6)
    lines: list[str] = []
    card = pack(str(source), tmp_path / "out", notify=lines.append)
    assert card.classes == (CAFE, "tea")
    counts = [split.class_counts for split in card.splits.values()]
    assert sum(count[CAFE] for count in counts) == 12
    assert any(CAFE in line and "two Unicode forms" in line for line in lines)


@pytest.mark.parametrize("name", [CAFE, CAFE_APART])
def test_one_form_keeps_the_name_of_its_folder(
    tmp_path: Path, make_folder: MakeFolder, name: str
) -> None:
    """The control: what worked before has the same digest."""
    lines: list[str] = []
    source = make_folder(tmp_path / "cups", [name, "tea"], 6)
    assert pack(str(source), tmp_path / "out", notify=lines.append).classes == (name, "tea")
    assert not any("Unicode" in line for line in lines)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train", "Train", "test"), "the folders Train and train are both read as train"),
        (("train", "test", "TEST", "val"), "the folders TEST and test are both read as test"),
        (("train", "test"), ""),
        (
            ("caf\u00e9-train", "cafe\u0301-train", "caf\u00e9-test"),
            "the folders cafe\u0301-train and caf\u00e9-train are both read as train",
        ),
    ],
)
def test_folders_of_one_split_that_differ_in_case_or_form_are_joined_and_said(
    tmp_path: Path, make_folder: MakeFolder, names: tuple[str, ...], said: str
) -> None:
    places = [f"{split}/{label}" for split in names for label in ("cat", "dog")]
    lines: list[str] = []
    card = pack(
        str(make_folder(tmp_path / "pets", places, 6)), tmp_path / "out", notify=lines.append
    )
    assert card.classes == ("cat", "dog")
    assert sum(split.samples for split in card.splits.values()) == len(places) * 6
    joined = [line for line in lines if "both read as" in line]
    assert joined == ([said] if said else [])
