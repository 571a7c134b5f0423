"""Names say which files may have labels, and which are about a data set."""

from __future__ import annotations

import pytest

from pipelines.data.file_kinds import could_be_labels, is_document


@pytest.mark.parametrize(
    "path",
    [
        *("labels.json", "a/b.TXT", "imagelabels.mat", "masks/1.npy", "y.pkl", "boxes.h5"),
        *("trainlist", "instances_train.json.gz", "labels.csv.zip"),
    ],
)
def test_files_that_may_have_labels(path: str) -> None:
    assert could_be_labels(path)


@pytest.mark.parametrize(
    "path",
    [
        "README",
        "LICENSE",
        "readme.txt",
        "1.jpg",
        "archive.zip",
        "images.tar.gz",
        ".git/index",
        "model.pt",
    ],
)
def test_files_that_have_none(path: str) -> None:
    assert not could_be_labels(path)


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("README.md", True),
        ("license-images.txt", True),
        ("__MACOSX/._labels.json", True),
        (".git/config", True),
        ("readme_1.jpg", False),
        ("labels/version2/1.txt", False),
    ],
)
def test_documents_are_told_by_their_names(path: str, document: bool) -> None:
    assert is_document(path) == document
