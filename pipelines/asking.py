"""A network, ready to be asked about the images of a packed data set.

In: a recipe, or a model's files, and a data set. Out: what the network sees of the data, and an
`Asker`; refusals where the two don't go together. Must not know what the answers are for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec, Family
from pipelines import checkpoints, judging
from pipelines.checkpoints import Model
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.data.loading.loaders import EvalLoader
from pipelines.evaluation import Asker
from pipelines.interfaces import World
from pipelines.recipe import Recipe

JUDGE = "judge"
"""The folder of a run, or of a payload, with the files of the classifier that judges."""


@dataclass(frozen=True)
class Subject:
    """A trained network and the data set that it is asked about. `data` is what it sees of that."""

    model: Model
    family: Family[Any]
    place: str
    card: Card
    data: DataSpec
    module: nn.Module
    ask: Asker

    def loader(
        self, split: str, world: World, *, only: np.ndarray[Any, Any] | None = None
    ) -> EvalLoader:
        """The images of a split, or those with the numbers `only`, as this network sees them."""
        return EvalLoader(
            self.place,
            self.card,
            self.data,
            batch_size=self.family.task.eval_batch,
            world=world,
            split=split,
            only=only,
            fit=self.model.recipe.data.fit,
            cache="none",
        )


def open_subject(
    folder: Path, digest: str, place: str, world: World, *, judge: str | Path | None = None
) -> Subject:
    """The model in `folder`, whose files must have `digest`, in fp32 on this rank's device. `judge`
    is the folder of the classifier that judges, where the task needs one. Raises TesseraError where
    the files or the data are other than they should be."""
    model = checkpoints.read_model(folder, digest)
    card, family, recipe = cards.read(place), models.get(model.recipe.family), model.recipe
    check_readable(family, card)
    if family.task.knows_classes and card.classes != model.card.classes:
        raise TesseraError(
            f"the model knows the classes {_some(model.card.classes)}, "
            f"the data set has {_some(card.classes)}",
            mend="evaluate it on data with the same classes in the same order",
        )
    data = seen_of(recipe, model.card)
    if recipe.data.fit == "pad" and family.any_size:
        # its own size for every image, and a frame for the largest
        frame = card.spec(recipe.data.height, recipe.data.width)
        data = dataclasses.replace(data, height=frame.height, width=frame.width)
    module = family.build(recipe.config(), data)
    module.load_state_dict(model.weights)
    module.to(world.device)
    make = asker(recipe, data, world, "fp32", judge_folder=Path(judge or ""))
    return Subject(model, family, place, card, data, module, make(module))


def asker(
    recipe: Recipe,
    data: DataSpec,
    world: World,
    precision: str,
    *,
    judge_folder: Path,
) -> Callable[[nn.Module], Asker]:
    """Makes a network one that can be asked."""
    judge = None
    if models.get(recipe.family).task.judged:
        judge = judging.open_judge(judge_folder, recipe.judge_digest, data, world.device)

    def ask(module: nn.Module) -> Asker:
        return Asker(
            models.get(recipe.family),
            module,
            data,
            world.device,
            augment_settings=recipe.augment_settings(),
            precision=precision,
            channels_last=recipe.train.channels_last,
            judge=judge,
        )

    return ask


def open_data(recipe: Recipe) -> tuple[Card, DataSpec]:
    """The recipe's data set; refused when it isn't the one that the recipe was made for."""
    card = cards.read(recipe.data.path)
    if recipe.data.digest and recipe.data.digest != card.digest:
        raise TesseraError(
            f"the data set in {recipe.data.path} is another than the recipe names: "
            f"digest {card.digest[:12]}…, recipe {recipe.data.digest[:12]}…",
            mend="give the data set it was made for, or --set data.digest= for a new training",
        )
    family = models.get(recipe.family)
    check_readable(family, card)
    if family.task.judged and not recipe.judge:
        raise UsageError(
            f"what a {recipe.family} makes is judged by a classifier of the same data, and none is "
            "named",
            mend="train one, then: --set judge=models:/NAME@ALIAS",
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
        mend=f"these train on it: {', '.join(fitting)}",
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")
