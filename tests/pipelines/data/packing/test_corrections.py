"""A corrections file is read strictly: what doesn't fit is an error with its file and its line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from packed_sets import Sample, pack_set
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects
from pipelines.data.card import Card, Split
from pipelines.data.images import make_key
from pipelines.data.index import Index
from pipelines.data.packing.corrections import Change, find_changes, read_corrections
from pipelines.storage.open import open_storage

CAT, DOG, EMU = range(3)


def image(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, Card]:
    """Classes cat, dog, emu; train has 6 samples in two shards, test has 3."""
    names = ["cat/1", "cat/zwei drei", "dog/1", "dog/2", "emu/1", "emu/2.5"]
    labels = [CAT, CAT, DOG, DOG, EMU, EMU]
    train: list[Sample] = [
        (make_key(name), image(at), label) for at, (name, label) in enumerate(zip(names, labels))
    ]
    test: list[Sample] = [(f"test/{label}", image(10 + label), label) for label in range(3)]
    splits = {"train": train, "test": test}
    folder = tmp_path / "set"
    classes = ("cat", "dog", "emu")
    return folder, pack_set(folder, "classification", splits, classes, shard_samples=4)


def changes_of(text: str | bytes, packed: tuple[Path, Card]) -> dict[Split, dict[int, Change]]:
    folder, card = packed
    file = folder.parent / "corrections.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    indices: dict[Split, Index] = {
        split: Index(open_storage(folder), found) for split, found in card.splits.items()
    }
    return find_changes(read_corrections(file).rows, card, indices)


@pytest.mark.parametrize(
    ("text", "train", "test"),
    [
        ("sample,action\ncat/1,dog\n", {0: DOG}, {}),
        ("sample,action\ncat/1.jpg,dog\ndog/1.JPG,drop\n", {0: DOG, 2: None}, {}),
        ("sample,action\ncat/zwei drei.jpg,emu\n", {1: EMU}, {}),
        ("sample,action\ncat/zwei%20drei,emu\n", {1: EMU}, {}),
        ("sample,action\nemu/2.5.png,cat\n", {5: CAT}, {}),
        (".\\emu\\2.5.png;cat\n", None, None),  # no header
        ("Sample;Action\n.\\emu\\2.5.png;cat\n", {5: CAT}, {}),
        ("sample\taction\tsplit\ntest/0\tdrop\ttest\n", {}, {0: None}),
        ("\ufeffsample,action\r\n\r\ncat/1,dog\r\n", {0: DOG}, {}),
        ("sample,class,suggested,margin,action\ncat/1,cat,dog,0.9,dog\n", {0: DOG}, {}),
        ("sample,action\ncat/1,class:dog\ndog/1,sample:drop\n", {0: DOG, 2: None}, {}),
        ("sample,action\ncat/1,\ndog/1,cat\n", {2: CAT}, {}),
    ],
)
def test_samples_are_found_by_key_and_by_file(
    text: str,
    train: dict[int, int | None] | None,
    test: dict[int, int | None] | None,
    packed: tuple[Path, Card],
) -> None:
    if train is None:
        with pytest.raises(TesseraError, match="line 1: the column"):
            changes_of(text, packed)
        return
    found = changes_of(text, packed)
    plain = {split: {n: c.label for n, c in changes.items()} for split, changes in found.items()}
    assert plain == {"train": train, "test": test}


def test_utf_16_of_a_spreadsheet_is_read(packed: tuple[Path, Card]) -> None:
    found = changes_of("sample\taction\ncat/1\tdog\n".encode("utf-16"), packed)
    assert found["train"] == {0: Change(DOG)}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "line 1: there is no column 'sample', the header has nothing", "begin the file with"),
        ("sample,class\ncat/1,dog\n", "line 1: there is no column 'action'", "sample,action"),
        ("sample,action,klass\n", "line 1: the column 'klass' is not known", "sample, split"),
        ("sample,action,action\n", "line 1: the column 'action' is there twice", "sample, split"),
        ("sample,action\n", "has no corrections: it has no rows", "drop"),
        ("sample,action\ncat/1,\n", "has no corrections: no action in 1 rows", "the new class"),
        ("sample,action\ncat/1,dog,\n", "line 2: 3 columns, the header has 2", "quotes"),
        ("sample,action\n,dog\n", "line 2: the sample is missing", "key or file"),
        ("sample,action\n\ncat/1,dgo\n", "line 3: unknown class 'dgo'", "did you mean 'dog'"),
        ("sample,action\ncat/1,drp\n", "line 2: unknown class 'drp'", "did you mean 'drop'"),
        ("sample,action\ncat/11.jpg,dog\n", "line 2: there is no sample 'cat/11.jpg'", "'cat/1'"),
        ("sample,action,split\ncat/1,dog,tset\n", "line 2: unknown split 'tset'", "'test'"),
        ("sample,action,split\ncat/1,dog,test\n", "line 2: 'cat/1' is in train, not in test", ""),
        ("sample,action\ncat/1,cat\n", "line 2: 'cat/1' has the class 'cat' already", "remove"),
        (
            "sample,action,class\ncat/1,dog,emu\n",
            "line 2: 'cat/1' has the class 'cat', not 'emu'",
            "another version",
        ),
        (
            "sample,action\ncat/1,dog\ncat/1.jpg,drop\n",
            "line 3: 'cat/1.jpg' has a correction already: ",
            "keep one",
        ),
        (b"sample,action\n\xff,dog\n", "is not UTF-8", "UTF-8"),
        ('sample,action\n"cat/1,dog\n', "can't be read", ""),
    ],
)
def test_what_does_not_fit_is_refused(
    text: str | bytes, message: str, hint: str, packed: tuple[Path, Card]
) -> None:
    with pytest.raises(TesseraError, match=re.escape(message)) as error:
        changes_of(text, packed)
    assert "corrections.csv" in error.value.message
    assert "\n" not in error.value.message
    assert hint in error.value.hint


def test_a_row_over_several_lines_does_not_shift_the_numbers(packed: tuple[Path, Card]) -> None:
    text = 'sample,action,suggested\ncat/1,dog,"a\nb"\nnone,dog,\n'
    with pytest.raises(TesseraError, match="line 4: there is no sample 'none'"):
        changes_of(text, packed)


def test_a_class_named_drop_is_not_dropped_by_chance(tmp_path: Path) -> None:
    train: list[Sample] = [("a", image(0), 0), ("b", image(1), 1)]
    card = pack_set(tmp_path / "set", "classification", {"train": train}, ("drop", "keep"))
    made = (tmp_path / "set", card)
    with pytest.raises(TesseraError, match="'drop' could be the class of that name") as error:
        changes_of("sample,action\nb,drop\n", made)
    assert "class:drop" in error.value.hint
    assert changes_of("sample,action\nb,class:drop\n", made)["train"] == {1: Change(0)}
    assert changes_of("sample,action\nb,sample:drop\n", made)["train"] == {1: Change(None)}


def test_other_tasks_can_only_drop(tmp_path: Path) -> None:
    objects = Objects(np.array([[1, 1, 5, 5.0]]), np.array([0]), np.array([False]))
    train: list[Sample] = [("a", image(0), objects), ("b", image(1), objects)]
    made = (tmp_path / "set", pack_set(tmp_path / "set", "detection", {"train": train}, ("cat",)))
    with pytest.raises(TesseraError, match="'cat' is not possible for detection: only drop") as e:
        changes_of("sample,action\nb,cat\n", made)
    assert "correct the labels in the source" in e.value.hint
    assert changes_of("sample,action\nb,drop\n", made)["train"] == {1: Change(None)}


def test_a_key_in_two_splits_needs_the_split(tmp_path: Path) -> None:
    one: list[Sample] = [("a", image(0), 0), ("b", image(1), 1)]
    splits = {"train": one, "test": one}
    made = (tmp_path / "set", pack_set(tmp_path / "set", "classification", splits, ("x", "y")))
    with pytest.raises(TesseraError, match="'a' is in train and test"):
        changes_of("sample,action\na,y\n", made)
    assert changes_of("sample,action,split\na,y,test\n", made)["test"] == {0: Change(1)}
