"""A trained network with the data set that it is evaluated on.

In: a model's files and a data set. Out: a loaded model; refusals where the two don't match.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import models
from models.core.errors import TesseraError
from models.core.family import DataSpec, Family
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.data.loading.loaders import EvalLoader
from pipelines.interfaces import World
from pipelines.training import checkpoints
from pipelines.training.checkpoints import Model
from pipelines.training.evaluator import Evaluator, make_evaluator
from pipelines.training.inputs import check_readable, seen_of


@dataclass(frozen=True)
class LoadedModel:
    """A trained network and the data set that it is asked about. `data` is what it sees of that."""

    model: Model
    family: Family[Any]
    place: str
    card: Card
    data: DataSpec
    module: nn.Module
    ask: Evaluator

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


def load_model(
    folder: Path, digest: str, place: str, world: World, *, judge: str | Path | None = None
) -> LoadedModel:
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
            hint="evaluate it on data with the same classes in the same order",
        )
    data = seen_of(recipe, model.card)
    if recipe.data.fit == "pad" and family.accepts_any_size:
        # its own size for every image, and a frame for the largest
        frame = card.spec(recipe.data.height, recipe.data.width)
        data = dataclasses.replace(data, height=frame.height, width=frame.width)
    module = family.build(recipe.config(), data)
    module.load_state_dict(model.weights)
    module.to(world.device)
    make = make_evaluator(recipe, data, world, "fp32", judge_folder=Path(judge or ""))
    return LoadedModel(model, family, place, card, data, module, make(module))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")
