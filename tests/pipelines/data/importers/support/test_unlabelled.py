"""Images without an annotation are left out with a note, or have no objects, as the option says."""

from __future__ import annotations

import pytest

from models.core.errors import UsageError
from pipelines.data.importers.support.unlabelled import add_unlabelled, take_unlabelled
from pipelines.data.sources import Item


def test_the_option_decides() -> None:
    notes: list[str] = []
    assert take_unlabelled(["a.jpg", "b.jpg"], {}, notes, "XML file") == ()
    assert "2 images without XML file, for example a.jpg: left out" in notes[0]
    assert "--option unlabelled=empty" in notes[0]
    items: list[Item] = []
    add_unlabelled(items, ["train/a.jpg"], {"unlabelled": "empty"}, notes, "XML file")
    assert items == [Item("train/a", "train/a.jpg", None, "train", -1)]
    assert "taken as images without objects" in notes[1]
    add_unlabelled(items, ["x/b.jpg"], {"unlabelled": "empty"}, notes, "XML", names_only=True)
    assert items[1].key == "b"
    assert not take_unlabelled([], {}, notes, "XML file")
    assert len(notes) == 3
    with pytest.raises(UsageError, match="unlabelled can't be 'maybe'"):
        take_unlabelled([], {"unlabelled": "maybe"}, notes, "XML file")
