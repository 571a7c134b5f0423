"""Begins a training with the weights of a registered version, whose classes may be others.

In: the files of the version, and a new network of the same family. Out: the network with the
version's weights. What belongs to a class is copied by the class's name; a class that the
version doesn't have keeps its new weights. Must not know where the files come from.

    K classes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec, Family
from pipelines.recipe import Recipe
from pipelines.training import checkpoints
from pipelines.training.checkpoints import Model
from pipelines.training.setup import TrainingSetup


@dataclass(frozen=True)
class Started:
    """Classes whose weights were copied, and the tensors that stay new in part or whole."""

    classes: tuple[str, ...]
    fresh: tuple[str, ...]


def check_family(folder: Path, recipe: Recipe) -> None:
    """Raises UsageError if the version in `folder` is of another family."""
    start, _ = checkpoints.read_identity(folder)
    if start.family != recipe.family:
        raise UsageError(
            f"{recipe.start_from} is a {start.family}, and a {recipe.family} can't begin with it",
            hint=f"train {start.family}, or leave start_from out",
        )


def begin_with(model: Model, module: nn.Module, setup: TrainingSetup) -> Started:
    """Loads the version's weights into `module`, a new network of `setup`.

    Raises TesseraError if the version has other layers.
    """
    before, now = model.card.classes, setup.data.classes
    axes = _class_axes(setup.family, setup.recipe.config(), setup.data)
    own = module.state_dict()
    loaded: dict[str, Tensor] = {}
    fresh, different = [], []
    for name, tensor in own.items():
        old = model.weights.get(name)
        if old is not None and name in axes:
            loaded[name], is_whole = _by_class(old, tensor, axes[name], before, now)
            if not is_whole:
                fresh.append(name)
        elif old is not None and old.shape == tensor.shape:
            loaded[name] = old
        elif not name.endswith("num_batches_tracked"):
            different.append(name)
    if different:
        named = ", ".join(different[:5]) + (" …" if len(different) > 5 else "")
        raise TesseraError(
            f"{setup.recipe.start_from} is another network: it differs in {named}",
            hint="use its variant, model settings and image size; tessera lineage shows them",
        )
    module.load_state_dict({**own, **loaded})
    return Started(tuple(name for name in now if name in before), tuple(fresh))


def _class_axes(family: Family[Any], config: Any, data: DataSpec) -> dict[str, int]:
    """Name of each tensor with a part for each class -> the axis of these parts, found by building
    the network for one class more."""
    if not data.classes:
        return {}
    counts = (*data.counts, 1) if data.counts else ()
    more = dataclasses.replace(data, classes=(*data.classes, "one more class"), counts=counts)
    shapes = [_shapes(family, config, spec) for spec in (data, more)]
    axes = {}
    for name, shape in shapes[0].items():
        other = shapes[1].get(name, shape)
        grown = [axis for axis, (a, b) in enumerate(zip(shape, other)) if a != b]
        if grown:
            axes[name] = grown[0]
    return axes


def _shapes(family: Family[Any], config: Any, data: DataSpec) -> dict[str, torch.Size]:
    with torch.random.fork_rng(devices=[]):
        state = family.build(config, data).state_dict()
    return {name: tensor.shape for name, tensor in state.items()}


def _by_class(
    old: Tensor, new: Tensor, axis: int, before: Sequence[str], now: Sequence[str]
) -> tuple[Tensor, bool]:
    """The new tensor with the parts of the classes that the old one has, and whether these are all
    of it. Parts that are not one for each class, as with a background, are copied only if the
    classes are the same."""
    if tuple(before) == tuple(now) and old.shape == new.shape:
        return old, True
    if old.shape[axis] != len(before) or new.shape[axis] != len(now):
        return new, False
    result, known = new.clone(), [name for name in now if name in before]
    if _without(old, axis) != _without(new, axis):
        return new, False
    for name in known:
        part = old.select(axis, before.index(name))
        result.select(axis, now.index(name)).copy_(part)
    return result, len(known) == len(now)


def _without(tensor: Tensor, axis: int) -> list[int]:
    return [size for place, size in enumerate(tensor.shape) if place != axis]
