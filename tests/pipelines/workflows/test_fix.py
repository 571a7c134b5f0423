"""`fix` as a function. `tests/pipelines/data/packing/test_fix.py` tests what is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from packed_sets import Sample, pack_set
from PIL import Image

from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.workflows.context import Context
from pipelines.workflows.fix import fix


def pack(folder: Path) -> Card:
    """12 images of three classes in each of train and test."""
    splits: dict[str, list[Sample]] = {
        split: [(f"{split}{n}", Image.new("L", (4, 4), n + start), n % 3) for n in range(12)]
        for split, start in (("train", 0), ("test", 100))
    }
    return pack_set(folder, "classification", splits, ("a", "b", "c"))


def test_fix_returns_the_path_of_the_new_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    pack(folder)
    file = tmp_path / "corrections.csv"
    file.write_text("sample,split,action\ntrain0,train,b\ntest1,test,drop\ntest2,test,\n")
    events: list[dict[str, Any]] = []
    context = Context.from_environment({"TESSERA_HOME": str(tmp_path / "home")})
    new = tmp_path / "new"
    data = fix(folder, file, to=new, name="other", progress=events.append, context=context)
    assert os.fspath(data) == data.location == str(new)
    assert data.card == cards.read(data.location)
    assert (data.card.name, data.samples) == ("other", 23)
    messages = [event["text"] for event in events if event["kind"] == "message"]
    assert messages == ["rows without an action, not applied: 1"]
    last = [event for event in events if event["kind"] == "advance"][-1]
    assert (last["done"], last["total"], last["unit"]) == (24, 24, "images")
