"""Defaults that fit the data set, where a training begins with the name of a family.

In: a family's default recipe, a card, and what the user sets. Out: the recipe to train, and the
settings that were chosen, each with a reason. Must not read anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import models
from models.core.family import Family
from models.core.fitted import DataFacts, Fitted
from pipelines import recipe as recipes
from pipelines.data.card import Card
from pipelines.recipe import Recipe


def facts_of(card: Card) -> DataFacts:
    """What the defaults depend on: size, number and classes of the training images. Raises
    TesseraError if there are none."""
    image = card.image
    return DataFacts(
        samples=card.split("train").samples,
        channels=image.channels,
        heights=(image.min_height, image.max_height),
        widths=(image.min_width, image.max_width),
        classes=card.classes,
    )


def fit(
    recipe: Recipe, card: Card, changes: Mapping[str, Any]
) -> tuple[Recipe, tuple[Fitted, ...]]:
    """The default recipe of a family, fitted to a data set, and then changed by `changes`, the
    user's settings by dotted path. Also returns what was fitted.

    Settings of the user and those that define a variant are kept. Raises UsageError for a change
    that can't be made, and TesseraError without training images.
    """
    family = models.get(recipe.family)
    changed = recipe.with_overrides(changes)
    settings = dict(recipes.leaves(changed.model_dump(mode="json")))
    kept = frozenset(
        path
        for path in settings
        if any(fnmatchcase(path, pattern) for pattern in changes)
        or path in _kept_of_variant(family, recipe.variant)
    )
    fitted = {
        one.path: one
        for one in family.fitted_defaults(changed.config(), facts_of(card), settings, kept)
        if one.path in settings and one.path not in kept
    }
    values = {one.path: one.value for one in fitted.values()}
    return recipe.with_overrides({**values, **changes}), tuple(
        one for one in fitted.values() if settings[one.path] != one.value
    )


def _kept_of_variant(family: Family[Any], variant: str) -> frozenset[str]:
    """What the variant sets. Its learning rates follow the size of a batch, unless it sets that,
    too."""
    own = family.variant_defaults.get(variant, {})
    has_batch = "train.batch_size" in own
    return frozenset(path for path in own if has_batch or not path.endswith(".lr"))
