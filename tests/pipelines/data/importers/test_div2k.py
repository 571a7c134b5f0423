"""Images in high and low resolutions: the high ones are packed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from layouts import pixels
from layouts.base import picture

from models.core.errors import TesseraError
from pipelines.data.importers import div2k
from pipelines.data.packing.account import account_for
from pipelines.data.packing.formats import recognise


def test_the_high_resolution_is_packed_and_every_file_belongs_to_it(tmp_path: Path) -> None:
    pixels.div2k(tmp_path)
    assert recognise(str(tmp_path))[0] == "div2k"
    source = div2k.read(str(tmp_path), {})
    assert Counter(item.split for item in source.items) == {"train": 8, "val": 2}
    assert source.load(source.items[0]) == (tmp_path / source.items[0].origin).read_bytes()
    used = {path for item in source.items for path in source.files(item)}
    assert used == {path for path in tmp_path.rglob("*") if path.is_file()}
    assert source.notes[0].startswith("20 images of low resolution are left out")


def test_a_low_resolution_without_a_partner_is_not_passed_over(tmp_path: Path) -> None:
    pixels.div2k(tmp_path)
    picture(tmp_path / "DIV2K_train_LR_bicubic/X2/9999x2.png", 77)
    account = account_for(div2k.read(str(tmp_path), {}))
    assert account is not None
    with pytest.raises(TesseraError, match=r"1 picture: .*9999x2\.png"):
        account.check()


@pytest.mark.parametrize(
    ("high", "low"),
    [("HR", "LR"), ("Flickr2K_HR", "Flickr2K_LR_bicubic"), ("train_hr", "train_lr")],
)
def test_other_names(tmp_path: Path, high: str, low: str) -> None:
    picture(tmp_path / high / "a.png")
    picture(tmp_path / low / "a.png", width=12, height=8)
    assert div2k.recognises(str(tmp_path))
    assert len(div2k.read(str(tmp_path), {}).files(div2k.read(str(tmp_path), {}).items[0])) == 2


def test_names_that_only_contain_the_letters_are_others(tmp_path: Path) -> None:
    """The control."""
    for name in ("chr", "ulr", "throw"):
        picture(tmp_path / name / "a.png")
    assert not div2k.recognises(str(tmp_path))
    with pytest.raises(TesseraError, match="no images of high resolution"):
        div2k.read(str(tmp_path), {})
