"""Defaults that fit a data set: what is chosen for every family, and what is never changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import models
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.training.fitting import fit

Make = Callable[..., Card]


@pytest.fixture
def card_of(digits: Path) -> Make:
    """The card of the digits with another number, size and kind of images."""
    card = cards.read(digits)

    def make(samples: int, heights: tuple[int, int], widths: tuple[int, int]) -> Card:
        sides = {
            "min_height": heights[0],
            "max_height": heights[1],
            "min_width": widths[0],
            "max_width": widths[1],
        }
        rgb = {"channels": 3, "mean": (0.5,) * 3, "std": (0.2,) * 3}
        train = card.splits["train"].model_copy(update={"samples": samples})
        return card.model_copy(
            update={
                "classes": ("cat", "dog"),
                "image": card.image.model_copy(update={**sides, **rgb}),
                "splits": {**card.splits, "train": train},
            }
        )

    return make


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize(
    ("samples", "heights", "widths"),
    [
        (5, (300, 400), (300, 700)),
        (600, (2062, 2062), (2149, 2149)),
        (60_000, (28, 28), (28, 28)),
        (2000, (7, 60), (7, 33)),
    ],
)
def test_what_is_chosen_makes_a_valid_recipe(
    name: str,
    samples: int,
    heights: tuple[int, int],
    widths: tuple[int, int],
    card_of: Make,
) -> None:
    family = models.get(name)
    for variant in family.variants:
        recipe = recipes.start(name, variant)
        fitted, chosen = fit(recipe, card_of(samples, heights, widths), {})
        before, after = recipe.flat(), fitted.flat()
        changed = {path for path in after if after[path] != before.get(path)}
        assert changed == {one.path for one in chosen}
        assert fit(recipe, card_of(samples, heights, widths), {}) == (fitted, chosen)
        own = {p for p in family.variant_defaults.get(variant, {}) if not p.endswith(".lr")}
        assert not changed & own
        longer = max(fitted.data.height or heights[1], fitted.data.width or widths[1])
        assert longer <= 1024 or name == "super_resolution"


def test_settings_of_the_user_are_kept(card_of: Make) -> None:
    changes: dict[str, Any] = {
        "train.epochs": 3,
        "augment.flip": False,
        "data.height": 48,
        "optim.*.lr": 0.07,
    }
    card = card_of(600, (300, 400), (300, 400))
    recipe, chosen = fit(recipes.start("resnet"), card, changes)
    assert recipe.train.epochs == 3
    assert recipe.augment["flip"] is False
    assert (recipe.data.height, recipe.data.width) == (48, 224)
    assert recipe.optim["model"].lr == 0.07
    assert not {"train.epochs", "augment.flip", "data.height", "optim.model.lr"} & {
        one.path for one in chosen
    }


def test_a_batch_that_the_user_sets_makes_the_steps(card_of: Make) -> None:
    card = card_of(600, (300, 400), (300, 400))
    recipe, _ = fit(recipes.start("resnet"), card, {"train.batch_size": 100})
    assert recipe.train.batch_size == 100
    assert recipe.train.epochs == 100  # 6 steps each
    assert recipe.optim["model"].lr == recipes.start("resnet").optim["model"].lr


def test_weights_from_elsewhere_are_only_tuned(card_of: Make) -> None:
    card = card_of(600, (300, 400), (300, 400))
    fresh, _ = fit(recipes.start("resnet"), card, {})
    tuned, chosen = fit(recipes.start("resnet"), card, {"model.weights": "w.safetensors"})
    assert tuned.optim["model"].kind == "adamw"
    assert tuned.train.epochs < fresh.train.epochs
    reasons = {one.path: one.reason for one in chosen}
    assert "weights from elsewhere" in reasons["optim.model.kind"]


def test_a_variant_with_its_own_batch_keeps_its_rate(card_of: Make) -> None:
    card = card_of(600, (300, 400), (300, 400))
    for variant in ("tiny", "base"):
        before = recipes.start("airbench", variant)
        after, _ = fit(before, card, {})
        kept = after.optim["model"].lr == before.optim["model"].lr
        assert kept == (variant == "tiny")
