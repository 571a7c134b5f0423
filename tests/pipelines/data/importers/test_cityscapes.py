"""Cityscapes: the classes are ids, and the files of test have no labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts import pixels

from models.core.errors import TesseraError
from pipelines.data.annotations import IGNORED, Mask
from pipelines.data.importers import cityscapes, image_folder, masks
from pipelines.data.packing import formats


def test_only_this_format_recognises_it(tmp_path: Path) -> None:
    pixels.cityscapes(tmp_path)
    assert formats.recognise(str(tmp_path)) == ("cityscapes", "leftImg8bit and gtFine")
    assert not masks.recognises(str(tmp_path))
    assert not image_folder.recognises(str(tmp_path))


def test_ids_stay_what_they_are_unless_an_option_says_otherwise(tmp_path: Path) -> None:
    pixels.cityscapes(tmp_path)
    source = cityscapes.read(str(tmp_path), {})
    assert len(source.classes) == 34
    assert source.classes[7] == "road"
    few = cityscapes.read(str(tmp_path), {"ids": "train"})
    assert len(few.classes) == 19
    for read, values in ((source, [7, 26]), (few, [0, 13])):
        assert read.annotate is not None
        mask = read.annotate(read.items[0])
        assert isinstance(mask, Mask)
        assert np.unique(mask.pixels).tolist() == values


def test_ids_that_are_not_evaluated_are_ignored_on_request_only(tmp_path: Path) -> None:
    pixels.cityscapes(tmp_path)
    path = tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    pixels.mask(path, np.full((16, 24), 9, np.uint8))
    for options, value in (({}, 9), ({"ids": "train"}, IGNORED)):
        source = cityscapes.read(str(tmp_path), options)
        assert source.annotate is not None
        mask = source.annotate(source.items[0])
        assert isinstance(mask, Mask)
        assert np.unique(mask.pixels).tolist() == [value]


def test_every_file_belongs_to_a_sample_or_to_test(tmp_path: Path) -> None:
    pixels.cityscapes(tmp_path)
    source = cityscapes.read(str(tmp_path), {})
    assert [item.split for item in source.items] == ["train"] * 4 + ["val"]
    used = {path for item in source.items for path in source.files(item)}
    assert used | set(source.shared_files) == {p for p in tmp_path.rglob("*") if p.is_file()}
    assert len(source.shared_files) == 4
    assert any("4 files of test are left out" in note for note in source.notes)


def test_an_image_without_its_mask_is_rejected(tmp_path: Path) -> None:
    pixels.cityscapes(tmp_path)
    (tmp_path / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png").unlink()
    source = cityscapes.read(str(tmp_path), {})
    assert [bool(item.problem) for item in source.items] == [False, True, False, False, False]
    with pytest.raises(TesseraError, match="has no leftImg8bit and gtFine side by side"):
        cityscapes.read(str(tmp_path / "gtFine"), {})
