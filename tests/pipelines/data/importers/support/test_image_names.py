"""Images are found in every form of a name, and no neighbour takes the place of a missing one."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from pipelines.data.card import Split
from pipelines.data.importers.support.image_names import ImageNames, split_name

COUNT = 4


def make(folder: Path, paths: list[str]) -> ImageNames:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    return ImageNames(folder, paths)


FORMS = [
    "{}.jpg",
    "./{}.jpg",
    "images/{}.jpg",
    "../images/{}.jpg",
    "images\\{}.jpg",
    ".\\images\\{}.jpg",
    "C:\\Users\\me\\set\\images\\{}.jpg",
    "\\\\server\\share\\images\\{}.jpg",
    "/home/me/set/images/{}.jpg",
    "https://host/bucket/images/{}.jpg",
    "https://host/images/{}.jpg?token=a/b#x",
    "s3://bucket/deep/images/{}.jpg",
    "file:///data/images/{}.jpg",
    "/data/local-files/?d=set/images/{}.jpg",
    "{}",
    "images/{}",
    "{}.JPG",
    "images//{}.jpg",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_common_form_of_a_name_is_found(tmp_path: Path, form: str) -> None:
    names = make(tmp_path, [f"images/{n}.jpg" for n in range(COUNT)] + ["images/other.jpg"])
    located = names.locate([form.format(number) for number in range(COUNT)])
    assert [origin for origin, _ in located] == [f"images/{n}.jpg" for n in range(COUNT)]
    assert not any(problem for _, problem in located)


@pytest.mark.parametrize("of_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("of_file", ["NFC", "NFD"])
def test_accents_are_found_in_both_forms(tmp_path: Path, of_disk: str, of_file: str) -> None:
    path = unicodedata.normalize(of_disk, "bilder/größe é.jpg")
    located = make(tmp_path, [path]).locate([unicodedata.normalize(of_file, "größe é.jpg")])
    assert located == [(path, None)]


def test_names_with_percent_signs_are_read_both_ways(tmp_path: Path) -> None:
    assert make(tmp_path / "a", ["i/a b.jpg"]).locate(["a%20b.jpg"])[0].origin == "i/a b.jpg"
    assert make(tmp_path / "b", ["i/a%20b.jpg"]).locate(["a%20b.jpg"])[0].origin == "i/a%20b.jpg"


@pytest.mark.parametrize("split", ["train", None])
def test_a_missing_image_is_not_replaced_by_a_neighbour(
    tmp_path: Path, split: Split | None
) -> None:
    """train/0.jpg is missing, and val/0.jpg is another image."""
    paths = [*(f"train/{n}.jpg" for n in range(1, COUNT)), *(f"val/{n}.jpg" for n in range(COUNT))]
    names = make(tmp_path, paths)
    located = names.locate([f"{n}.jpg" for n in range(COUNT)], ["", "train/"], split)
    assert [bool(problem) for _, problem in located] == [True, False, False, False]
    assert [origin for origin, _ in located][1:] == [f"train/{n}.jpg" for n in range(1, COUNT)]
    # The control: without a preferred folder and a split the larger folder is as good.
    assert names.locate(["0.jpg"])[0].origin == "val/0.jpg"


def test_a_folder_of_another_split_is_never_used(tmp_path: Path) -> None:
    names = make(tmp_path, [f"val/{n}.jpg" for n in range(COUNT)])
    wanted = [f"{n}.jpg" for n in range(COUNT)]
    assert all(problem for _, problem in names.locate(wanted, split="train"))
    assert not any(problem for _, problem in names.locate(wanted, split="val"))


def test_images_spread_over_folders_are_found_only_if_all_are(tmp_path: Path) -> None:
    names = make(tmp_path, ["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    assert [o for o, _ in names.locate(["1.jpg", "2.jpg", "3.jpg"])] == [
        "a/1.jpg",
        "a/2.jpg",
        "b/3.jpg",
    ]
    located = names.locate(["1.jpg", "2.jpg", "3.jpg", "4.jpg"])
    assert [bool(problem) for _, problem in located] == [False, False, True, True]
    twice = make(tmp_path / "twice", ["a/1.jpg", "a/2.jpg", "b/3.jpg", "c/3.jpg"])
    assert twice.locate(["1.jpg", "2.jpg", "3.jpg"])[2].problem


def test_equal_names_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    names = make(tmp_path, [f"{folder}/{n}.jpg" for folder in "ab" for n in range(2)])
    wanted = [f"/old/place/{folder}/{n}.jpg" for folder in "ba" for n in range(2)]
    assert [o for o, _ in names.locate(wanted)] == ["b/0.jpg", "b/1.jpg", "a/0.jpg", "a/1.jpg"]


def test_frames_of_many_videos_are_told_apart(tmp_path: Path) -> None:
    """All have the same name: their folders say which is which."""
    paths = [f"images/video{n}/frame.jpg" for n in range(300)]
    names = ImageNames(tmp_path, paths)
    for wanted in ([f"D:\\old\\video{n}\\frame.jpg" for n in range(300)], paths):
        assert [origin for origin, _ in names.locate(wanted)] == paths


def test_two_names_are_never_one_image(tmp_path: Path) -> None:
    names = make(tmp_path, ["i/1.jpg", "i/2.jpg"])
    located = names.locate(["a/1.jpg", "b/1.jpg", "a/2.jpg"])
    assert [problem and problem[0] for _, problem in located] == [
        "ambiguous image",
        "ambiguous image",
        None,
    ]
    assert not names.locate(["a/1.jpg", "a/1.jpg"])[0].problem  # the same name twice


def test_the_folder_with_most_of_the_names_is_taken(tmp_path: Path) -> None:
    names = make(tmp_path, ["1.jpg", *(f"images/{n}.jpg" for n in range(COUNT))])
    located = names.locate([f"{n}.jpg" for n in range(COUNT)], ["", "images/"])
    assert [origin for origin, _ in located] == [f"images/{n}.jpg" for n in range(COUNT)]


def test_two_suffixes_of_one_name_are_not_guessed_between(tmp_path: Path) -> None:
    names = make(tmp_path, ["i/a.jpg", "i/a.png", "i/b.jpg"])
    located = names.locate(["b", "a", "a.png"])
    assert [bool(problem) for _, problem in located] == [False, True, False]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\0b", ""])
def test_names_outside_the_source_are_refused(tmp_path: Path, name: str) -> None:
    (located,) = make(tmp_path, ["i/a.jpg"]).locate([name])
    assert located.problem is not None
    assert located.problem[0] == "path outside the source"


def test_the_parts_of_a_name() -> None:
    assert split_name("C:\\a\\.\\b.jpg") == ("a", "b.jpg")
    assert split_name("http://h/a%20b/c.jpg?x#y") == ("a b", "c.jpg")
    assert split_name("a?b#c.jpg") == ("a?b#c.jpg",)
