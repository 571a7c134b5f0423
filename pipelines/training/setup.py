"""What a training works with: recipe, family, data card and data spec, read and checked once.

In: a recipe. Out: a `TrainingSetup`, or a TesseraError that says why this recipe can't train.
`prepare` runs on the driver before a run exists; a worker gets recipe and card in its payload and
calls `TrainingSetup.of`, which reads nothing. Must not know MLflow, nor what runs the workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec, Family
from models.core.losses import LossSettings
from models.metrics import custom as custom_metrics
from pipelines.cluster.connection import Resources
from pipelines.cluster.worker_count import WorkerGroup, check_fits
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.data.loading import preflight
from pipelines.recipe import Recipe


@dataclass(frozen=True)
class TrainingSetup:
    """A recipe with everything that is derived from it and its data set.

    `recipe.data.digest` is always filled in. `data` is what the network sees of the data set.
    """

    recipe: Recipe
    family: Family[Any]
    card: Card
    data: DataSpec

    @classmethod
    def of(cls, recipe: Recipe, card: Card) -> TrainingSetup:
        """The setup for a card that was read before. Reads no file.

        Raises TesseraError if the recipe names another data set, or if the family can't read it.
        """
        if recipe.data.digest and recipe.data.digest != card.digest:
            raise TesseraError(
                f"the data set in {recipe.data.path} is not the one that the recipe names: "
                f"its digest is {card.digest[:12]}…, the recipe has {recipe.data.digest[:12]}…",
                hint="use the original data set, or --set data.digest= for a new training",
            )
        family = models.get(recipe.family)
        check_readable(family, card)
        if family.task.needs_judge and not recipe.judge:
            raise UsageError(
                f"images made by {recipe.family} are judged by a classifier of the same data, and "
                "the recipe names none",
                hint="train one, then: --set judge=models:/NAME@ALIAS",
            )
        if not recipe.data.digest:
            recipe = recipe.with_overrides({"data.digest": card.digest})
        if recipe.primary_metric and not recipe.primary_direction:
            # A trained model is usable where the function that declares it is not installed.
            direction = recipe.primary().direction
            recipe = recipe.with_overrides({"primary_direction": direction})
        data, train = data_spec(recipe, card), recipe.train
        if (train.loss, train.class_weights) != ("cross_entropy", "none"):
            settings = LossSettings.of(train.loss, train.class_weights, data.counts)
            family = family.with_loss(settings)
        return cls(recipe, family, card, data)

    def build_module(self) -> nn.Module:
        """A fresh network on the CPU. Its weights depend on torch's seed alone."""
        return self.family.build(self.recipe.config(), self.data)


def open_setup(recipe: Recipe) -> TrainingSetup:
    """Reads the card of the recipe's data set. Raises as `TrainingSetup.of`."""
    return TrainingSetup.of(recipe, cards.read(recipe.data.path))


def prepare(
    recipe: Recipe, *, resources: Resources | None = None, check_weights: bool = True
) -> TrainingSetup:
    """Reads the card and checks that the recipe can train. Creates nothing.

    Args:
        resources: What the workers can use; None if that isn't known yet.
        check_weights: Whether to read the pretrained weights that the recipe names. This takes as
            long as reading, or downloading, the file. A resumed training doesn't need them, and
            a machine that only submits a job may not have them.

    Raises:
        TesseraError: The data set is missing, damaged, not the recipe's, or too small for the
            workers; the workers don't fit into `resources`; the network can't be built; the
            weights can't be read or don't fit the network.
    """
    setup = open_setup(recipe)
    check_ready(setup, resources=resources, check_weights=check_weights)
    return setup


def check_ready(
    setup: TrainingSetup, *, resources: Resources | None = None, check_weights: bool = True
) -> None:
    """The checks of `prepare`, for a setup that is open already. Raises as `prepare`."""
    recipe, card, where = setup.recipe, setup.card, setup.recipe.data.path
    for metric in recipe.metrics:
        custom_metrics.get(metric)
    recipe.primary()
    workers, batch_size = recipe.workers.largest, recipe.train.batch_size
    preflight.check_feedable(card, workers=workers, batch_size=batch_size, where=where)
    preflight.check_files(where, card, "val")
    if resources is not None:
        check_fits(worker_group(recipe), resources)
    check_network(setup, check_weights=check_weights)


def check_network(setup: TrainingSetup, *, check_weights: bool = True) -> None:
    """Builds the network as a worker does, without memory for its weights where that is possible.

    Raises TesseraError if the network or one of its optimizers can't be made, or if the weights
    that the recipe names don't fit.
    """
    try:
        with _meta_device():
            _try_network(setup, check_weights)
    except Exception:
        # Some networks can't be built on the meta device, because their constructor reads values
        # (`linspace(…).tolist()`) or calls an operator that has no meta kernel, and a family may
        # report that as an error of its own. Only an error that also occurs on the CPU is real.
        # This costs the time and the memory of one network.
        try:
            with torch.random.fork_rng(devices=[]):
                _try_network(setup, check_weights)
        except TesseraError:
            raise
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0][:200]
            raise TesseraError(
                f"{setup.family.name} can't be built for images of "
                f"{setup.data.height}x{setup.data.width} pixels: {type(error).__name__}: {line}",
                hint="check the settings under model; --verbose shows the traceback",
            ) from error


@contextmanager
def _meta_device() -> Iterator[None]:
    """Modules made here have shapes but no values. Copying weights into them does nothing, of
    which torch warns for each tensor."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is a no-op")
        yield


def _try_network(setup: TrainingSetup, check_weights: bool) -> None:
    module = setup.build_module()
    for part in setup.family.parts(module):
        optim_settings(setup, part)
    if check_weights:
        setup.family.warm_start(setup.recipe.config(), module)


def optim_settings(setup: TrainingSetup, part: str) -> Any:
    """The optimizer settings of a part of the network. Raises TesseraError if there are none."""
    if part not in setup.recipe.optim:
        raise TesseraError(f"the recipe has no optimizer for {setup.family.name}'s {part!r}")
    return setup.recipe.optim[part]


def worker_group(recipe: Recipe) -> WorkerGroup:
    """The workers that a recipe asks for."""
    workers = recipe.workers
    return WorkerGroup(
        workers.smallest,
        cpus=workers.cpus,
        gpus=workers.gpus,
        max_failures=workers.max_failures,
        max_workers=workers.largest,
        wait_seconds=workers.wait_seconds,
    )


def data_spec(recipe: Recipe, card: Card) -> DataSpec:
    """What the recipe's network sees of a data set."""
    reads = models.get(recipe.family).task.reads
    return card.spec(recipe.data.height, recipe.data.width, reads=reads)


def check_readable(family: Family[Any], card: Card) -> None:
    """Raises TesseraError if the data set doesn't have the annotations that the family needs."""
    task = family.task
    if card.can_be_read_as(task.reads):
        return
    fitting = [n for n in models.names() if card.can_be_read_as(models.get(n).task.reads)]
    kind = card.task.replace("_", " ")
    raise TesseraError(
        f"{family.name} does {task.name.replace('_', ' ')}, but the data set is one of {kind}",
        hint=f"these train on it: {', '.join(fitting)}",
    )
