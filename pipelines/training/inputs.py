"""A network, ready to be asked about the images of a packed data set.

In: a recipe, or a model's files, and a data set. Out: what the network sees of the data, and an
`Evaluator`; refusals where the two don't go together. Must not know what the answers are for.
"""

from __future__ import annotations

from typing import Any

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec, Family
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.recipe import Recipe

JUDGE = "judge"
"""The folder of a run, or of a payload, with the files of the classifier that judges."""


def open_data(recipe: Recipe) -> tuple[Card, DataSpec]:
    """The recipe's data set; refused when it isn't the one that the recipe was made for."""
    card = cards.read(recipe.data.path)
    if recipe.data.digest and recipe.data.digest != card.digest:
        raise TesseraError(
            f"the data set in {recipe.data.path} is another than the recipe names: "
            f"digest {card.digest[:12]}…, recipe {recipe.data.digest[:12]}…",
            hint="give the data set it was made for, or --set data.digest= for a new training",
        )
    family = models.get(recipe.family)
    check_readable(family, card)
    if family.task.needs_judge and not recipe.judge:
        raise UsageError(
            f"what a {recipe.family} makes is judged by a classifier of the same data, and none is "
            "named",
            hint="train one, then: --set judge=models:/NAME@ALIAS",
        )
    return card, seen_of(recipe, card)


def seen_of(recipe: Recipe, card: Card) -> DataSpec:
    """What the recipe's network sees of a data set."""
    task = models.get(recipe.family).task
    return card.spec(recipe.data.height, recipe.data.width, reads=task.reads)


def check_readable(family: Family[Any], card: Card) -> None:
    """Refuses data of which the family can't read what it asks for."""
    task = family.task
    if card.can_be_read_as(task.reads):
        return
    fitting = [n for n in models.names() if card.can_be_read_as(models.get(n).task.reads)]
    kind = card.task.replace("_", " ")
    raise TesseraError(
        f"{family.name} does {task.name.replace('_', ' ')}, but the data set is one of {kind}",
        hint=f"these train on it: {', '.join(fitting)}",
    )
