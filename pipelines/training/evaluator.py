"""Predictions and metrics of a split that don't depend on the number of ranks.

In: a network, its family, an `EvalLoader`. Out: a record of each image in the order of the data
set, and metrics over all of them. Each rank compares its own predictions with the truth, so what is
gathered is small. Batches have a fixed composition and are distributed over the ranks: the network
sees the same batches with one rank as with eight, and no row is padded or counted twice. Must not
know where the metrics go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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

PredictBatch = Callable[[Batch], tuple[list[Prediction], list[Target]]]
"""From a loader's batch to predictions and targets, one each per image. An `Evaluator` is one."""


class Loader(Protocol):
    """Yields (index of the batch in the split, batch) for the batches of this rank."""

    def batches(self) -> Iterable[tuple[int, Batch]]: ...


@dataclass(frozen=True)
class Predictions:
    """What is known of each image after a pass over a split: one entry per image in each list, in
    the order of the data set.

    Args:
        records: Prediction and truth compared, as `Task.make_record` gives it.
        keys: Names of the samples.
        indices: Positions of the samples in the split.
        details: What `describe` returned for each image; empty if it wasn't given.
    """

    records: list[Record]
    keys: list[str]
    indices: list[int]
    details: list[Any] = field(default_factory=list)

    def metrics(
        self, family: Family[Any], data: DataSpec, custom: Sequence[str] = ()
    ) -> dict[str, float]:
        """The task's metrics over all images, and the `custom` ones that a recipe names."""
        metrics = custom_metrics.metrics(family.task, custom, self.records, data)
        return {name: float(value) for name, value in metrics.items()}

    def worst(self, family: Family[Any], count: int) -> list[int]:
        """Positions in `records` of the predictions that are most wrong, the worst first."""
        scores = [family.task.error_score(record) for record in self.records]
        return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision for "bf16", nothing for "fp32"."""
    if precision == "bf16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


def to_device(batch: Batch, device: str) -> Batch:
    """The batch with its tensors, and its lists of tensors, on the device."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [item.to(device, non_blocking=True) for item in value]
        return value

    return {name: move(value) for name, value in batch.items()}


class Evaluator:
    """Predicts whole batches with a network in evaluation mode, which is left as it was."""

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
        """Predictions and targets of a loader's batch, one each per image."""
        return self.predict_transformed(self.transform(batch), batch)

    @torch.no_grad()
    def transform(self, batch: Batch) -> Batch:
        """A loader's batch as the network sees it, on the device."""
        rows = len(batch["key"])
        # An evaluation has no randomness: the seed only fills the argument.
        rng = BatchRng(0, rows, slice(0, rows))
        transformed = self._transform(to_device(batch, self._device), rng)
        if self._channels_last and transformed["image"].ndim == 4:
            image = transformed["image"].contiguous(memory_format=torch.channels_last)
            transformed["image"] = image
        return transformed

    @torch.no_grad()
    def predict_transformed(
        self, transformed: Batch, batch: Batch
    ) -> tuple[list[Prediction], list[Target]]:
        """Predictions of a transformed batch, and the targets of the loader's `batch`."""
        task = self._family.task
        was_training = self._module.training
        self._module.eval()
        try:
            with autocast(self._device, self._precision):
                predictions = self._family.predict(self._module, transformed)
        finally:
            self._module.train(was_training)
        targets = task.targets(batch)
        if self._judge is not None:
            task.apply_judge(self._judge, predictions, targets)
        return predictions, targets


def build_evaluator(
    recipe: Recipe,
    data: DataSpec,
    module: nn.Module,
    device: str,
    *,
    precision: str = "fp32",
    judge: Judge | None = None,
) -> Evaluator:
    """The evaluator of a recipe's network. `judge` is needed where the task needs one."""
    return Evaluator(
        models.get(recipe.family),
        module,
        data,
        device,
        augment_settings=recipe.augment_settings(),
        precision=precision,
        channels_last=recipe.train.channels_last,
        judge=judge,
    )


@dataclass(frozen=True)
class _BatchResult:
    """What is known of one batch. `fields` are the records, one value or stacked tensor a field."""

    index: int
    fields: dict[str, Any]
    count: int
    keys: list[str]
    indices: list[int]
    details: list[Any]


def predict_split(
    family: Family[Any],
    predict_batch: PredictBatch,
    data: DataSpec,
    loader: Loader,
    world: World,
    *,
    describe: Callable[[Batch], Sequence[Any]] | None = None,
) -> Predictions | None:
    """Predicts every image of a split once. Called by all ranks; returns the predictions on rank 0
    and None elsewhere. `describe` returns something small about each image of a batch."""
    own: list[_BatchResult] = []
    for index, batch in loader.batches():
        predictions, targets = predict_batch(batch)
        records = [
            family.task.make_record(prediction, target, data)
            for prediction, target in zip(predictions, targets, strict=True)
        ]
        details = list(describe(batch)) if describe else []
        fields = _stack_fields(records)
        indices = batch["index"].tolist()
        own.append(_BatchResult(index, fields, len(records), batch["key"], indices, details))
    gathered = distributed.gather(own, world)
    if gathered is None:
        return None
    result = Predictions([], [], [])
    for item in sorted((i for part in gathered for i in part), key=lambda i: int(i.index)):
        result.records.extend(
            {name: values[row] for name, values in item.fields.items()} for row in range(item.count)
        )
        result.keys.extend(item.keys)
        result.indices.extend(item.indices)
        result.details.extend(item.details)
    return result


def _stack_fields(records: Sequence[Record]) -> dict[str, Any]:
    """The records by field. Tensors of one shape are stacked: pickling one large tensor is much
    cheaper than a thousand small ones."""
    fields: dict[str, Any] = {}
    for name in records[0] if records else ():
        values = [record[name] for record in records]
        alike = all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values)
        fields[name] = torch.stack(values) if alike else values
    return fields
