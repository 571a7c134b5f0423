"""Names in tables and lists are found among the images of a source, and never guessed."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from pipelines.data.importers.support.image_finder import ImageFinder

IMAGES = ["a/1.jpg", "a/2.JPG", "b/3.png", "b/é.jpg", "b/4.x.jpg", "top.jpg"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a/1.jpg", "a/1.jpg"),
        ("./a/1.jpg", "a/1.jpg"),
        ("a\\1.jpg", "a/1.jpg"),
        ("a/1", "a/1.jpg"),
        ("a/2.jpg", "a/2.JPG"),
        ("b/4.x", "b/4.x.jpg"),
        ("1.jpg", "a/1.jpg"),
        ("3", "b/3.png"),
        (unicodedata.normalize("NFD", "b/é.jpg"), "b/é.jpg"),
        ("/home/me/set/a/1.jpg", "a/1.jpg"),
        ("C:\\set\\a\\1.jpg", "a/1.jpg"),
        ("https://host/x/a/1.jpg?size=1", "a/1.jpg"),
        ("file:///x/a/1.jpg", "a/1.jpg"),
        ("a/9.jpg", ""),
        ("x/1.jpg", ""),  # a relative path is never shortened: it may mean another image
        ("1.png", ""),
        ("../top.jpg", ""),
        ("", ""),
        ("a\0b", ""),
    ],
)
def test_a_name_is_found_in_each_of_its_forms(tmp_path: Path, name: str, path: str) -> None:
    ((found, problem),) = ImageFinder(tmp_path, IMAGES).find_all([name])
    assert (found if problem is None else "") == path


def test_absolute_paths_in_the_source_are_found_through_links(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "alias").symlink_to(folder)
    for root in (folder, tmp_path / "alias"):
        finder = ImageFinder(tmp_path / "alias", IMAGES, near="b")
        assert finder.find_all([f"{root}/a/1.jpg"]) == [("a/1.jpg", None)]


def test_two_images_of_one_name_are_not_told_apart_by_chance(tmp_path: Path) -> None:
    finder = ImageFinder(tmp_path, ["train/1.jpg", "test/1.jpg", "test/2.jpg", "train/1.png"])
    ((_, problem),) = finder.find_all(["1.jpg"])
    assert problem is not None
    assert problem[0] == "several images of this name"
    # The name of the table tells, and then nothing is taken from the other folder.
    found = finder.find_all(["1.jpg", "2.jpg"], "train.csv")
    assert [path for path, problem in found if not problem] == ["train/1.jpg"]
    ((_, problem),) = finder.find_all(["train/1"])
    assert problem is not None
    assert "could be train/1.jpg, train/1.png" in problem[1]


def test_what_is_cut_off_is_the_same_for_all_names(tmp_path: Path) -> None:
    finder = ImageFinder(tmp_path, ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"])
    names = ["/data/cat/1.jpg", "/data/cat/2.jpg", "/data/dog/3.jpg", "/data/dog/1.jpg"]
    found = finder.find_all(names)
    assert [problem is None for _, problem in found] == [True, True, True, False]


def test_an_absolute_path_in_a_folder_of_the_source_is_not_found_in_another(tmp_path: Path) -> None:
    """Also where it is alone, so that nothing tells how much to cut off."""
    finder = ImageFinder(tmp_path, ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"])
    ((path, problem),) = finder.find_all(["/data/dog/1.jpg"])
    assert path == "/data/dog/1.jpg"
    assert problem is not None
    assert problem[0] == "path outside the source"
    # The control: no folder of the source has this name.
    assert finder.find_all(["/data/photos/1.jpg"]) == [("cat/1.jpg", None)]
