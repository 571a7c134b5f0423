"""A trained network together with the data set that it is evaluated on.

In: a model's files and a data set. Out: a `LoadedModel`, or a TesseraError where the two don't
match. Must not know what it is evaluated for.
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
from pipelines.training.evaluator import Evaluator, build_evaluator
from pipelines.training.judge import open_judge
from pipelines.training.setup import check_readable, data_spec


@dataclass(frozen=True)
class LoadedModel:
    """A trained network on this rank's device, with a data set.

    Args:
        location: Folder or address of the data set.
        card: The data set's own card, not the one that the model was trained with.
        data: What the network sees of the data set.
        module: The network, in fp32.
        evaluator: Predicts batches of `loader`.
    """

    model: Model
    family: Family[Any]
    location: str
    card: Card
    data: DataSpec
    module: nn.Module
    evaluator: Evaluator

    def loader(
        self, split: str, world: World, *, only: np.ndarray[Any, Any] | None = None
    ) -> EvalLoader:
        """Loads the images of a split as the network sees them, or only those at the positions
        `only`, int64 (N,)."""
        return EvalLoader(
            self.location,
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
    folder: Path, digest: str, location: str, world: World, *, judge: str | Path | None = None
) -> LoadedModel:
    """Loads the model in `folder`, whose files must have `digest`.

    Args:
        location: Folder or address of the data set to evaluate on.
        judge: Folder of the classifier that judges, where the task needs one.

    Raises:
        DamagedError: The model's files are not those that were registered.
        TesseraError: The data set can't be read by this family, or has other classes.
    """
    model = checkpoints.read_model(folder, digest)
    card, family, recipe = cards.read(location), models.get(model.recipe.family), model.recipe
    check_readable(family, card)
    if family.task.knows_classes and card.classes != model.card.classes:
        raise TesseraError(
            f"the model knows the classes {_shorten(model.card.classes)}, "
            f"the data set has {_shorten(card.classes)}",
            hint="evaluate it on data with the same classes in the same order",
        )
    data = data_spec(recipe, model.card)
    if recipe.data.fit == "pad" and family.accepts_any_size:
        # Each image keeps its own size, in a frame for the largest of this data set.
        frame = card.spec(recipe.data.height, recipe.data.width)
        data = dataclasses.replace(data, height=frame.height, width=frame.width)
    module = family.build(recipe.config(), data)
    module.load_state_dict(model.weights)
    module.to(world.device)
    opened = None
    if family.task.needs_judge:
        opened = open_judge(Path(judge or ""), recipe.judge_digest, data, world.device)
    evaluator = build_evaluator(recipe, data, module, world.device, judge=opened)
    return LoadedModel(model, family, location, card, data, module, evaluator)


def _shorten(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")
