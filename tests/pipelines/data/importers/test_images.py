"""Folders of images without labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import sample_sources

from models.core.errors import TesseraError
from pipelines.data.importers import images


def test_images_alone_are_read(tmp_path: Path) -> None:
    for name in (
        "a.jpg",
        "train/b.png",
        "train/deep/c.jpg",
        "valid/d.jpg",
        "TEST/e.jpg",
        "x/f.jpg",
    ):
        sample_sources.image(tmp_path / "set" / name)
    (tmp_path / "set" / "notes.txt").write_text("x")
    source = images.read(str(tmp_path / "set"), {})
    assert (source.task, source.classes, source.annotate) == ("images", (), None)
    assert {item.origin: item.split for item in source.items} == {
        "TEST/e.jpg": "test",
        "a.jpg": None,
        "train/b.png": "train",
        "train/deep/c.jpg": "train",
        "valid/d.jpg": "val",
        "x/f.jpg": None,
    }
    assert source.folder == tmp_path / "set"
    assert source.load(source.items[0]) == source.files(source.items[0])[0].read_bytes()
    with pytest.raises(TesseraError, match="no folder"):
        images.read(str(tmp_path / "none"), {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(TesseraError, match="has no images"):
        images.read(str(tmp_path / "empty"), {})


@pytest.mark.parametrize(
    ("paths", "fits"),
    [
        (["a.jpg", "b.png"], True),
        (["train/a.jpg", "val/b.jpg", "test/c.jpg"], True),
        (["images/a.jpg"], True),
        (["cat/a.jpg", "dog/b.jpg"], False),
        (["train/cat/a.jpg", "train/dog/b.jpg"], False),
        (["images/a.jpg", "masks/b.jpg"], False),
        (["images/a.jpg", "labels/b.json"], False),
        (["a.txt"], False),
        (["a.jpg", "b.jpg", "labels.json"], False),
        (["a.jpg", "b.jpg", "imagelabels.mat"], False),
        (["a.jpg", "b.jpg", "labels.npy"], False),
        (["images/a.jpg", "train-labels"], False),
        (["a.jpg", "b.jpg", "archive.zip", "weights.pt"], True),
        (["a.jpg", "b.jpg", "README.txt", "LICENSE"], True),
        (["photos/a.jpg", "b.jpg"], True),
        (["train/a.jpg", "test/b.jpg", "extra/c.jpg"], False),
        (["images/train/a.jpg", "images/val/b.jpg"], True),
    ],
)
def test_images_recognises_folders_without_annotations(
    tmp_path: Path, paths: list[str], fits: bool
) -> None:
    for path in paths:
        if path.endswith(("jpg", "png")):
            sample_sources.image(tmp_path / path)
        else:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("{}")
    assert bool(images.recognises(str(tmp_path))) == fits
