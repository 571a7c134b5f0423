"""Errors about unknown names suggest the nearest known one."""

from __future__ import annotations

import pytest

from models.core.errors import nearest, unknown

SETTINGS = [
    "optim.model.lr",
    "optim.model.weight_decay",
    "train.epochs",
    "train.batch_size",
    "data.height",
    "model.depth",
]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("optim.model.lrr", "optim.model.lr"),
        ("lr", "optim.model.lr"),
        ("LR", "optim.model.lr"),
        ("epochs", "train.epochs"),
        ("epoch", "train.epochs"),
        ("batch-size", "train.batch_size"),
        ("model.lr", "optim.model.lr"),
        ("weigth_decay", "optim.model.weight_decay"),
        ("data.heigth", "data.height"),
        ("flavour", None),
    ],
)
def test_the_nearest_path_is_suggested_at_any_depth(given: str, expected: str | None) -> None:
    assert nearest(given, SETTINGS) == expected


def test_the_hint_lists_the_names_or_how_to_list_them() -> None:
    assert unknown("fruit", "aple", ["apple", "pear"]).hint == (
        "did you mean 'apple'? Known: apple, pear"
    )
    assert unknown("fruit", "xyz", ["apple", "pear"]).hint == "known: apple, pear"
    assert unknown("fruit", "aple", ["apple"], see="shop list").hint == (
        "did you mean 'apple'? See: shop list"
    )
    many = [f"name{number:02d}" for number in range(20)]
    assert unknown("name", "xyz", many).hint.endswith("name11, …")
