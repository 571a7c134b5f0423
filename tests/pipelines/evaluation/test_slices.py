"""Slices of a data set: by image size, by brightness, by metadata from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.core.errors import UsageError
from pipelines.evaluation import slices
from pipelines.evaluation.slices import Traits


def test_brightness_excludes_the_padding() -> None:
    image = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    image[:, :, :2, :2] = 255
    batch = {
        "image": image,
        "size": torch.tensor([[20, 10], [40, 40]]),
        "extent": torch.tensor([[2, 2], [4, 4]]),
    }
    assert slices.describe(batch) == [Traits(20, 10, 1.0), Traits(40, 40, 0.25)]


def test_each_image_is_in_one_of_the_thirds() -> None:
    traits = [Traits(10, 10, value / 90) for value in range(90)]
    result = slices.make(traits, [str(n) for n in range(90)], {})
    assert [part.by for part in result] == ["brightness"] * 3, "all are of one size"
    assert [len(part.indices) for part in result] == [30, 30, 30]
    assert sorted(index for part in result for index in part.indices) == list(range(90))
    assert result[0].span == "0 to 0.322"


def test_equal_values_give_fewer_slices() -> None:
    traits = [Traits(10, 10, 0.5)] * 9 + [Traits(10, 10, 0.9)]
    result = slices.make(traits, [str(n) for n in range(10)], {})
    assert [len(part.indices) for part in result] == [9, 1]


def test_fields_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "fields.csv"
    lines = [f"{n},{'left' if n % 2 else 'right'},{n / 7},name-{n}" for n in range(30)]
    file.write_text("\n".join(["key,side,weight,name", *lines]) + "\n")
    fields = slices.read_fields(file)
    result = slices.make([], [str(n) for n in range(30)], fields)
    assert [(part.by, part.name) for part in result] == [
        ("side", "left"),
        ("side", "right"),
        *(("weight", third) for third in slices.THIRDS),
    ], "thirty names are no slices"
    assert result[0].indices == tuple(range(1, 30, 2))


def test_samples_missing_in_the_file_are_in_no_slice(tmp_path: Path) -> None:
    file = tmp_path / "fields.csv"
    file.write_text("key,side\na,left\nb,right\n")
    result = slices.make([], ["a", "b", "c"], slices.read_fields(file))
    assert [part.indices for part in result] == [(0,), (1,)]


@pytest.mark.parametrize("text", ["", "name,side\na,left\n", "key,side\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "fields.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match="no column 'key'"):
        slices.read_fields(file)


def test_an_invalid_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read as CSV"):
        slices.read_fields(tmp_path)
