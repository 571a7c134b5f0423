"""Classes that lost their images are refused, and those that are hard to learn are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.data.packing.class_checks import find_alike
from pipelines.data.packing.pack import pack

MakeFolder = Callable[..., Path]


@pytest.mark.parametrize("other", ["Cat", "cat ", "CAT", "\uff43at"])
def test_classes_with_nearly_the_same_name_are_named(
    tmp_path: Path, make_folder: MakeFolder, other: str
) -> None:
    """They stay two: whether they are one is up to the user."""
    source = make_folder(tmp_path / "pets", ["cat", "dog", other], 6)
    lines: list[str] = []
    card = pack(str(source), tmp_path / "out", notify=lines.append)
    assert set(card.classes) == {"cat", "dog", other}
    (line,) = [line for line in lines if "nearly the same name" in line]
    assert repr(other) in line
    assert "'cat'" in line


def test_a_number_in_two_forms_is_named() -> None:
    names = ("1", "1.0", "2", "2.5", "25", "v1.0")
    assert find_alike(names) == {"1.0": "1"}


def test_other_names_are_not_alike(tmp_path: Path, make_folder: MakeFolder) -> None:
    """The control."""
    lines: list[str] = []
    source = make_folder(tmp_path / "pets", ["cat", "cats", "c at", "-", "_"], 6)
    pack(str(source), tmp_path / "out", notify=lines.append)
    assert not any("nearly the same name" in line for line in lines)


@pytest.mark.parametrize(
    ("val", "hint"),
    [
        ("Cat", "if it is the class 'cat', give both the same name"),
        ("emu", "each class needs train images; check the names of the class folders"),
    ],
)
def test_a_class_without_train_images_is_refused_with_what_helps(
    tmp_path: Path, make_folder: MakeFolder, val: str, hint: str
) -> None:
    names = ["train/cat", "train/dog", f"val/{val}", "val/dog"]
    source = make_folder(tmp_path / "pets", names, 6)
    with pytest.raises(TesseraError, match=f"val has the class '{val}', train doesn't") as caught:
        pack(str(source), tmp_path / "out")
    assert caught.value.hint == hint
    (source / "val" / val).rename(source / "val" / "cat")
    assert pack(str(source), tmp_path / "out").classes == ("cat", "dog")  # the control
