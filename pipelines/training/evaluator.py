"""Figures that don't depend on who computed them.

In: a network, a family, an `EvalLoader`. Out: a record of each image in the data set's order, and
exact figures. A rank compares its own predictions with the truth; what is gathered is small. Batches have a fixed composition and are dealt to the ranks, so that a network sees
the same batches with one rank as with eight; no row is padded or counted twice. Must not know
where the figures go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import models
from models.core.family import (
    Batch,
    BatchRng,
    DataSpec,
    Family,
    Judge,
    Prediction,
    Record,
    Target,
    Transform,
)
from models.metrics import custom as custom_metrics
from pipelines.interfaces import World
from pipelines.recipe import Recipe
from pipelines.training import distributed
from pipelines.training import judge as training_judge


class Loader(Protocol):
    """Gives (number of the batch, batch) for the batches that are this rank's."""

    def batches(self) -> Iterable[tuple[int, Batch]]: ...


@dataclass(frozen=True)
class Predictions:
    """What was found of each image, in the data set's order: one entry an image in each list."""

    records: list[Record]
    keys: list[str]
    indices: list[int]
    noted: list[Any] = field(default_factory=list)
    """What was noted of each image, where something was."""

    def metrics(
        self, family: Family[Any], data: DataSpec, custom: Sequence[str] = ()
    ) -> dict[str, float]:
        """The task's metrics and those that the recipe names (`custom`)."""
        metrics = custom_metrics.metrics(family.task, custom, self.records, data)
        return {name: float(value) for name, value in metrics.items()}

    def worst(self, family: Family[Any], count: int) -> list[int]:
        """Positions of the answers that are most wrong, the worst first."""
        scores = [family.task.error_score(record) for record in self.records]
        return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    if precision == "bf16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


def to_device(batch: Batch, device: str) -> Batch:
    """The batch with its tensors, and its lists of tensors, on the device."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [item.to(device, non_blocking=True) for item in value]
        return value

    return {name: moved(value) for name, value in batch.items()}


class Evaluator:
    """A network that is asked for the answers of whole batches."""

    def __init__(
        self,
        family: Family[Any],
        module: nn.Module,
        data: DataSpec,
        device: str,
        *,
        augment_settings: Any,
        precision: str = "fp32",
        channels_last: bool = False,
        judge: Judge | None = None,
    ) -> None:
        self._family, self._module, self._data, self._device = family, module, data, device
        self._transform: Transform = family.augment(augment_settings, data, train=False)
        self._precision, self._channels_last, self._judge = precision, channels_last, judge

    def __call__(self, batch: Batch) -> tuple[list[Prediction], list[Target]]:
        """Predictions and truths of a loader's batch, one each an image."""
        return self.about(self.see(batch), batch)

    @torch.no_grad()
    def see(self, batch: Batch) -> Batch:
        """A loader's batch as the network sees it."""
        rows = len(batch["key"])
        seen = self._transform(to_device(batch, self._device), BatchRng(0, rows, slice(0, rows)))
        if self._channels_last and seen["image"].ndim == 4:
            seen["image"] = seen["image"].contiguous(memory_format=torch.channels_last)
        return seen

    @torch.no_grad()
    def about(self, seen: Batch, batch: Batch) -> tuple[list[Prediction], list[Target]]:
        """Predictions of what is seen, and the truths of the batch that it is of."""
        task = self._family.task
        was_training = self._module.training
        self._module.eval()
        try:
            with autocast(self._device, self._precision):
                predictions = self._family.predict(self._module, seen)
        finally:
            self._module.train(was_training)
        targets = task.targets(batch)
        if self._judge is not None:
            task.apply_judge(self._judge, predictions, targets)
        return predictions, targets


Ask = Callable[[Batch], tuple[list[Prediction], list[Target]]]


def answer(
    family: Family[Any],
    ask: Ask,
    data: DataSpec,
    loader: Loader,
    world: World,
    *,
    note: Callable[[Batch], Sequence[Any]] | None = None,
) -> Predictions | None:
    """Predicts every image once; the answers are on rank 0, None elsewhere. Called by all ranks.
    `note` says something small of each image of a batch."""
    mine = []
    for number, batch in loader.batches():
        predictions, targets = ask(batch)
        records = [
            family.task.make_record(prediction, target, data)
            for prediction, target in zip(predictions, targets, strict=True)
        ]
        noted = list(note(batch)) if note else []
        mine.append((number, records, batch["key"], batch["index"].tolist(), noted))
    gathered = distributed.gather([_pack(item) for item in mine], world)
    if gathered is None:
        return None
    answers = Predictions([], [], [])
    for item in sorted((i for part in gathered for i in part), key=lambda i: int(i[0])):
        _, records, keys, indices, noted = _unpack(item)
        answers.records.extend(records)
        answers.keys.extend(keys)
        answers.indices.extend(indices)
        answers.noted.extend(noted)
    return answers


def _pack(item: tuple[Any, ...]) -> tuple[Any, ...]:
    """Stacks fields that are tensors of one shape: one large object is sent, not a thousand."""
    number, records, *rest = item
    packed: dict[str, Any] = {}
    for name in records[0] if records else ():
        values = [record[name] for record in records]
        alike = all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values)
        packed[name] = torch.stack(values) if alike else values
    return (number, packed, len(records), *rest)


def _unpack(item: tuple[Any, ...]) -> tuple[Any, ...]:
    number, packed, count, *rest = item
    records = [{name: values[i] for name, values in packed.items()} for i in range(count)]
    return (number, records, *rest)


def make_evaluator(
    recipe: Recipe,
    data: DataSpec,
    world: World,
    precision: str,
    *,
    judge_folder: Path,
) -> Callable[[nn.Module], Evaluator]:
    """Makes a network one that can be asked."""
    judge = None
    if models.get(recipe.family).task.needs_judge:
        judge = training_judge.open_judge(judge_folder, recipe.judge_digest, data, world.device)

    def ask(module: nn.Module) -> Evaluator:
        return Evaluator(
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
