"""Label files are paired with images beside them or opposite, and with no others."""

from __future__ import annotations

import time

import pytest

from pipelines.data.importers.support.pairs import pair, split_in_folders


@pytest.mark.parametrize(
    ("label", "image"),
    [
        ("x.txt", "x.jpg"),
        ("train/x.xml", "train/x.jpg"),
        ("labels/x.txt", "images/x.jpg"),
        ("labels/train/x.txt", "images/train/x.jpg"),
        ("train/labels/x.txt", "train/images/x.jpg"),
        ("a/labels/deep/er/x.txt", "a/images/deep/er/x.jpg"),
        ("Annotations/x.xml", "JPEGImages/x.jpg"),
        ("training/label_2/x.txt", "training/image_2/x.png"),
        ("xmls/x.xml", "x.jpg"),
        ("annotations/x.xml", "images/val/x.jpg"),
        ("annotations/x.xml", "val/x.jpg"),
        ("somewhere/x.xml", "elsewhere/x.jpg"),
    ],
)
def test_a_label_file_finds_its_image(label: str, image: str) -> None:
    assert pair([label], [image, "images/other.jpg"]) == {label: image}


@pytest.mark.parametrize(
    ("label", "images"),
    [
        ("train/x.xml", ["val/x.jpg"]),
        ("labels/train/x.txt", ["images/val/x.jpg"]),
        ("labels/x.txt", ["images/a/x.jpg", "images/b/x.jpg"]),
        ("somewhere/x.xml", ["a/x.jpg", "b/x.jpg"]),
        ("x.xml", ["y.jpg"]),
    ],
)
def test_an_image_of_another_place_is_not_taken(label: str, images: list[str]) -> None:
    assert pair([label], images) == {}


def test_images_anywhere_are_only_taken_if_none_is_in_place() -> None:
    """y.xml's image is missing, and the one elsewhere is another."""
    images = ["images/x.jpg", "old/y.jpg"]
    assert pair(["labels/x.xml", "labels/y.xml"], images) == {"labels/x.xml": "images/x.jpg"}
    assert pair(["labels/y.xml"], ["old/y.jpg"]) == {"labels/y.xml": "old/y.jpg"}  # the control


def test_accents_and_dots_in_names() -> None:
    assert pair(["labels/e\u0301.txt"], ["images/\u00e9.jpg"]) == {
        "labels/e\u0301.txt": "images/\u00e9.jpg"
    }
    assert pair(["a.b.txt"], ["a.b.jpg", "a.jpg"]) == {"a.b.txt": "a.b.jpg"}


@pytest.mark.parametrize(
    ("path", "split"),
    [("train/x.jpg", "train"), ("a/Validation/b/x.jpg", "val"), ("train.jpg", None), ("a/x", None)],
)
def test_the_split_of_a_path(path: str, split: str | None) -> None:
    assert split_in_folders(path) == split


def test_thousands_of_folders_take_no_quadratic_time() -> None:
    labels = [f"labels/train/video{n}/frame.txt" for n in range(5000)]
    images = [f"images/train/video{n}/frame.jpg" for n in range(5000)]
    before = time.process_time()
    assert len(pair(labels, images)) == len(labels)
    assert time.process_time() - before < 3
