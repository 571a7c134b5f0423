"""Kaggle's ImageNet: classes of train are folders, those of val are in a table."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts.folders import imagenet as make

from models.core.errors import TesseraError
from pipelines.data.importers import imagenet
from pipelines.data.packing.account import account_for


def test_val_gets_its_classes_from_the_table(tmp_path: Path) -> None:
    folder = make(tmp_path)
    source = imagenet.read(str(folder), {})
    val = [(item.origin[-8:], item.label) for item in source.items if item.split == "val"]
    assert val == [("000.JPEG", 0), ("001.JPEG", 1)]
    found = account_for(source)
    assert found is not None
    assert [group.folder for group in found.unused] == ["ILSVRC/Data/CLS-LOC/test"]
    (folder / imagenet.SOLUTION).write_text("ImageId,PredictionString\n")  # the control
    problems = [item.problem and item.problem[0] for item in imagenet.read(str(folder), {}).items]
    assert problems == [None] * 8 + ["missing label"] * 2


def test_other_sources_are_not_recognised(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert imagenet.recognises(str(folder)) == (
        "synsets in LOC_synset_mapping.txt and LOC_val_solution.csv"
    )
    (folder / "ILSVRC").rename(folder / "other")
    assert imagenet.recognises(str(folder)) == ""
    with pytest.raises(TesseraError, match="no folder train with synset folders"):
        imagenet.read(str(folder), {})
