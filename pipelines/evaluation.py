"""Figures that don't depend on who computed them.

In: a network, a family, an `EvalLoader`. Out: predictions and targets in the data set's order, and
exact figures. Batches have a fixed composition and are dealt to the ranks, so that a network sees
the same batches with one rank as with eight; no row is padded or counted twice. Must not know
where the figures go.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.core.family import Batch, DataSpec, Draws, Family, Prediction, Transform
from pipelines import distributed
from pipelines.ports import World


class Loader(Protocol):
    """Gives (number of the batch, batch) for the batches that are this rank's."""

    def batches(self) -> Iterable[tuple[int, Batch]]: ...


@dataclass(frozen=True)
class Answers:
    """One entry an image, in the data set's order."""

    predictions: list[Prediction]
    targets: list[dict[str, Any]]
    keys: list[str]
    indices: list[int]

    def figures(self, family: Family[Any], data: DataSpec) -> dict[str, float]:
        figures = family.task.figures(self.predictions, self.targets, data)
        return {name: float(value) for name, value in figures.items()}

    def worst(self, family: Family[Any], count: int) -> list[int]:
        """Positions of the answers that are most wrong, the worst first."""
        scores = [
            family.task.badness(p, t) for p, t in zip(self.predictions, self.targets, strict=True)
        ]
        return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    if precision == "bf16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


def to_device(batch: Batch, device: str) -> Batch:
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
    }


@torch.no_grad()
def answer(
    family: Family[Any],
    module: nn.Module,
    data: DataSpec,
    loader: Loader,
    world: World,
    *,
    augment_settings: Any,
    precision: str = "fp32",
    channels_last: bool = False,
) -> Answers | None:
    """Predicts every image once; the answers are on rank 0, None elsewhere. Called by all ranks."""
    transform: Transform = family.augment(augment_settings, data, train=False)
    was_training = module.training
    module.eval()
    mine = []
    try:
        for number, batch in loader.batches():
            rows = len(batch["key"])
            seen = transform(to_device(batch, world.device), Draws(0, rows, slice(0, rows)))
            if channels_last:
                seen["image"] = seen["image"].contiguous(memory_format=torch.channels_last)
            with autocast(world.device, precision):
                predictions = family.predict(module, seen)
            indices = batch["index"].tolist()
            mine.append((number, predictions, family.task.targets(batch), batch["key"], indices))
    finally:
        module.train(was_training)
    gathered = distributed.gather([_pack(item) for item in mine], world)
    if gathered is None:
        return None
    answers = Answers([], [], [], [])
    for item in sorted((i for part in gathered for i in part), key=lambda i: int(i[0])):
        _, predictions, targets, keys, indices = _unpack(item)
        answers.predictions.extend(predictions)
        answers.targets.extend(targets)
        answers.keys.extend(keys)
        answers.indices.extend(indices)
    return answers


def _pack(item: tuple[Any, ...]) -> tuple[Any, ...]:
    """Stacks fields that are tensors of one shape: one large object is sent, not a thousand."""
    number, predictions, *rest = item
    packed: dict[str, Any] = {}
    for name in predictions[0] if predictions else ():
        values = [p[name] for p in predictions]
        alike = all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values)
        packed[name] = torch.stack(values) if alike else values
    return (number, packed, len(predictions), *rest)


def _unpack(item: tuple[Any, ...]) -> tuple[Any, ...]:
    number, packed, count, *rest = item
    predictions = [{name: values[i] for name, values in packed.items()} for i in range(count)]
    return (number, predictions, *rest)
