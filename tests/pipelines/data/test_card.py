"""The card describes a data set, and any change of it is detected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.data import card as cards
from pipelines.data.card import Card

MakeSet = Callable[..., tuple[Path, Card]]


def test_a_card_round_trip(make_set: MakeSet) -> None:
    folder, card = make_set(12)
    assert cards.read(folder) == card
    assert cards.parse(card.to_json(), "here").to_json() == card.to_json()


def test_the_digest_covers_every_value(make_set: MakeSet) -> None:
    _, card = make_set(12)
    changes: dict[str, object] = {
        "name": "other",
        "task": "detection",
        "classes": ["a", "c", "b"],
        "source": "elsewhere",
        "licence": "MIT",
        "rejected": 1,
        "root": "elsewhere",
        "leakage": {"near": 1, "images": 2},
    }
    for field, value in changes.items():
        tree = json.loads(card.to_json())
        assert tree[field] != value
        tree[field] = value
        with pytest.raises(TesseraError, match="its digest does not match its content"):
            cards.parse(json.dumps(tree), "here")
    tree = json.loads(card.to_json())
    tree["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    with pytest.raises(TesseraError, match="its digest does not match its content"):
        cards.parse(json.dumps(tree), "here")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"name": 3}', "[" * 100_000, '{"name": NaN}', "\\ud800"],
)
def test_an_invalid_card_is_refused(text: str) -> None:
    with pytest.raises(TesseraError, match=r"^here is not a valid card"):
        cards.parse(text, "here")


def test_unknown_keys_and_splits_are_refused(make_set: MakeSet) -> None:
    _, card = make_set(12)
    tree = json.loads(card.to_json())
    for change in ({"extra": 1}, {"splits": {"dev": tree["splits"]["train"]}}):
        with pytest.raises(TesseraError, match=r"^here is not a valid card: (extra|splits)"):
            cards.parse(json.dumps(tree | change), "here")


def test_a_folder_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match=r"is not a packed data set: it has no card\.json"):
        cards.read(tmp_path)


def test_a_binary_card_is_refused(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TesseraError, match=r"card\.json is not a valid card"):
        cards.read(tmp_path)


def test_the_spec_has_the_largest_or_the_requested_size(make_set: MakeSet) -> None:
    _, card = make_set(3)
    wide = card.model_copy(update={"image": card.image.model_copy(update={"max_width": 9})})
    assert wide.spec().shape == (1, 4, 9)
    assert wide.spec(height=2, width=3).shape == (1, 2, 3)
    assert wide.spec().classes == card.classes


def test_a_split_without_samples_is_refused(make_set: MakeSet) -> None:
    _, card = make_set(3)
    assert card.split("train").samples == 3
    with pytest.raises(TesseraError, match="no 'val' split"):
        card.split("val")


def test_the_hint_without_a_card(tmp_path: Path) -> None:
    def hint(folder: Path) -> str:
        with pytest.raises(TesseraError, match=r"no card\.json") as caught:
            cards.read(folder)
        return caught.value.hint or ""

    source = tmp_path / "photos"
    source.mkdir()
    assert hint(source) == f"pack one: tessera pack SOURCE --to {source}"
    (source / "a.jpg").write_bytes(b"")
    assert hint(source) == f"if it is a source, run tessera pack {source} --to DIR, and use DIR"
    assert hint(tmp_path / "new") == f"pack one: tessera pack SOURCE --to {tmp_path / 'new'}"
    (tmp_path / ".new.packing").mkdir()
    again = "its pack was interrupted: run the same tessera pack command again to resume it"
    assert hint(tmp_path / "new") == again
