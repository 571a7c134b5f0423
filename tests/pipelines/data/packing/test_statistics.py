"""Damaged objects and lost annotations are dropped within a budget, and listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts.base import text
from layouts.box_files import coco, yolo_line
from layouts.box_sets import COUNT, each, images

from models.core.errors import TesseraError
from pipelines.data.card import Card
from pipelines.data.packing.pack import pack
from pipelines.data.packing.statistics import REJECTED

Edit = Callable[[dict[str, Any]], object]
FLAT = {"bbox": [1, 1, 0, 5]}


def build(folder: Path, edit: Edit, *, masks: bool = False) -> Path:
    images(folder, "images/{}.jpg")
    content = coco([f"{number}.jpg" for number in range(COUNT)], masks=masks)
    edit(content)
    text(folder / "labels.json", json.dumps(content))
    return folder


def change(*numbers: int, **fields: Any) -> Edit:
    return lambda content: [content["annotations"][number].update(fields) for number in numbers]


def lose(count: int) -> Edit:
    """Adds annotations of images that aren't listed."""
    return lambda content: [
        content["annotations"].append({**content["annotations"][0], "id": 90 + n, "image_id": 900})
        for n in range(count)
    ]


def objects(card: Card) -> int:
    return sum(sum((split.class_counts or {}).values()) for split in card.splits.values())


def rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / REJECTED).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "masks", "reason"),
    [
        ({"bbox": [9, 1, -4, 5]}, False, "box inverted"),
        ({"bbox": [1, 1, 500, 5]}, False, "box outside the image"),
        ({"bbox": ["1", 1, 5, 5]}, False, "unreadable annotation"),
        ({"bbox": None}, False, "unreadable annotation"),
        ({"category_id": 77}, False, "unknown class"),
        ({"segmentation": []}, True, "missing mask"),
        ({"segmentation": [[1, 1, 1, 1, 1, 1]]}, True, "mask without pixels"),
        ({"segmentation": [[1, 1, 500, 1, 5, 5]]}, True, "polygon outside the image"),
    ],
)
def test_each_kind_of_damage_is_dropped_with_its_reason(
    tmp_path: Path, fields: dict[str, Any], masks: bool, reason: str
) -> None:
    check_damage(tmp_path, fields, masks, reason)


def test_a_damaged_object_costs_its_image_or_with_the_option_itself(tmp_path: Path) -> None:
    check_damage(tmp_path, FLAT, False, "box without area")


def check_damage(tmp_path: Path, fields: dict[str, Any], masks: bool, reason: str) -> None:
    source = str(build(tmp_path / "in", change(1, **fields), masks=masks))
    with pytest.raises(TesseraError, match=f"1 of {COUNT} images .*{reason}: 1") as caught:
        pack(source, tmp_path / "out")
    assert "--drop boxes" in caught.value.hint
    card = pack(source, tmp_path / "images", allow_rejected="1")
    assert (card.rejected, objects(card)) == (1, COUNT - 1)
    assert sum(split.samples for split in card.splits.values()) == COUNT - 1
    card = pack(source, tmp_path / "objects", drop=["boxes"], allow_rejected="1")
    assert (card.rejected, objects(card)) == (0, COUNT - 1)
    assert sum(split.samples for split in card.splits.values()) == COUNT
    (row,) = rows(tmp_path / "objects")
    assert (row["key"], row["reason"]) == ("images/1", reason)
    assert row["object"] == ("" if "category_id" in fields else "blue")


@pytest.mark.parametrize(
    ("allowed", "fits"), [("1", False), ("2", True), ("33%", False), ("34%", True)]
)
@pytest.mark.parametrize("edit", [change(0, 3, **FLAT), lose(2)], ids=["damaged", "lost"])
def test_the_budget_counts_objects(tmp_path: Path, edit: Edit, allowed: str, fits: bool) -> None:
    source = str(build(tmp_path / "in", edit))
    total = json.loads((tmp_path / "in" / "labels.json").read_text())["annotations"]
    if len(total) > COUNT and allowed.endswith("%"):
        allowed = {"33%": "24%", "34%": "25%"}[allowed]  # 2 of 8, not of 6
    if fits:
        card = pack(source, tmp_path / "out", drop=["boxes"], allow_rejected=allowed)
        assert objects(card) == len(total) - 2
        assert len(rows(tmp_path / "out")) == 2
        return
    with pytest.raises(TesseraError, match=f"2 of {len(total)} objects can't be packed") as caught:
        pack(source, tmp_path / "out", drop=["boxes"], allow_rejected=allowed)
    assert "--allow-rejected 2" in caught.value.hint


def test_lost_annotations_count_without_the_option_too(tmp_path: Path) -> None:
    source = str(build(tmp_path / "in", lose(1)))
    with pytest.raises(TesseraError, match=r"1 of 7 objects .*image '900', which is not listed"):
        pack(source, tmp_path / "out")
    said: list[str] = []
    card = pack(source, tmp_path / "out", allow_rejected="1", notify=said.append)
    assert objects(card) == COUNT
    assert f"objects that are left out: 1; see {REJECTED}" in said
    assert pack(str(build(tmp_path / "in", lose(0))), tmp_path / "control").rejected == 0


def test_a_class_that_would_lose_all_its_objects_is_refused(tmp_path: Path) -> None:
    source = str(build(tmp_path / "in", change(0, 2, 4, **FLAT)))
    with pytest.raises(TesseraError, match="no object of the class 'red' is left"):
        pack(source, tmp_path / "out", drop=["boxes"], allow_rejected="50%")
    assert objects(pack(source, tmp_path / "out", drop=["boxes"], allow_rejected="100%")) == 3
    source = str(build(tmp_path / "control", change(0, 2, **FLAT)))
    assert objects(pack(source, tmp_path / "two", drop=["boxes"], allow_rejected="50%")) == 4


def test_what_is_wrong_with_all_boxes_is_not_dropped(tmp_path: Path) -> None:
    source = str(build(tmp_path / "in", change(1, bbox=[0.1, 0.1, 0.5, 0.5])))
    with pytest.raises(TesseraError, match="box normalised: 1"):
        pack(source, tmp_path / "out", drop=["boxes"])


def test_the_hint_on_a_rejected_image_is_shown_and_listed(tmp_path: Path) -> None:
    each("images/{}.jpg", "labels/{}.txt", yolo_line, tmp_path / "in")
    text(tmp_path / "in" / "labels" / "0.txt", "0 400 300 20 20\n")
    text(tmp_path / "in" / "classes.txt", "red\nblue\n")
    with pytest.raises(TesseraError) as caught:
        pack(str(tmp_path / "in"), tmp_path / "out")
    assert "divided by the image's width and height" in caught.value.hint
    pack(str(tmp_path / "in"), tmp_path / "out", allow_rejected="1")
    assert "divided by the image's width" in rows(tmp_path / "out")[0]["hint"]


def test_dropping_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source = str(build(tmp_path / "in", change(0, 3, **FLAT)))
    whole = pack(source, tmp_path / "whole", drop=["boxes"], allow_rejected="2")
    with pytest.raises(TesseraError, match="2 of 6 objects"):
        pack(source, tmp_path / "out", drop=["boxes"], allow_rejected="1")
    said: list[str] = []
    card = pack(source, tmp_path / "out", drop=["boxes"], allow_rejected="2", notify=said.append)
    assert any(line.startswith("resuming") for line in said)
    assert card.digest == whole.digest
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
