"""The lists beside the shards, as they are read back and described."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.data.inspection import lists
from pipelines.data.packing.account import Account


def group(*images: tuple[str, str]) -> lists.CopyGroup:
    rows = [
        {"key": name, "origin": f"{name}.png", **({"class": label} if label else {})}
        for name, label in images
    ]
    return lists.CopyGroup.model_validate({"split": "train", "images": rows})


def test_groups_with_several_classes_come_first(tmp_path: Path) -> None:
    groups = [group(("a", "cat"), ("b", "cat")), group(("c", "cat"), ("d", "dog"))]
    text = "".join(json.dumps(one.model_dump(by_alias=True)) + "\n" for one in groups)
    (tmp_path / lists.COPIES).write_text(text)
    assert [one.in_conflict for one in lists.read_copies(tmp_path)] == [True, False]
    assert lists.read_copies(tmp_path / "elsewhere") == []


def test_copies_and_conflicts_are_counted() -> None:
    same = group(("a", "cat"), ("b", "cat"), ("c", "cat"))
    assert dict(lists.describe_copies([same], 3)) == {
        "copies": "2 images within a split; see copies.jsonl"
    }
    boxes = group(("a", ""), ("b", ""))
    assert dict(lists.describe_copies([boxes], 3)) == {
        "copies": "1 image within a split; see copies.jsonl"
    }
    conflicts = [group((f"a{n}", "cat"), (f"b{n}", "dog")) for n in range(3)]
    assert dict(lists.describe_copies([same, *conflicts], 2))["conflicts"] == (
        "3 times the same pixels have different classes: a0.png is cat, b0.png is dog; "
        "a1.png is cat, b1.png is dog; …"
    )
    assert dict(lists.describe_copies([], 3)) == {}


def test_the_account_is_read_as_it_was_written(tmp_path: Path) -> None:
    account = Account("photos", 9, images=4, labels=1, documents=1, others={".zip": 2, "": 1})
    (tmp_path / "account.json").write_text(account.to_json())
    found = lists.read_account(tmp_path)
    assert str(found) == str(account)
    assert lists.read_account(tmp_path / "elsewhere") is None
    (tmp_path / "account.json").write_text('{"files": "many"}')
    with pytest.raises(TesseraError, match=r"account.json can't be read"):
        lists.read_account(tmp_path)
