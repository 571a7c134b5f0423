"""Losses and speed of the training steps between two logging steps.

In: the losses of each piece of a batch. Out: their means over all ranks, or a NotFiniteError that
names the samples. Must not know the loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.core.errors import TesseraError
from pipelines.interfaces import World
from pipelines.training import distributed

SHOWN_KEYS = 8


class NotFiniteError(TesseraError):
    """The loss or a weight became NaN or infinite."""


@dataclass(frozen=True)
class WindowMeans:
    """Over all ranks. `data_wait_share` is the share of the time spent waiting for data."""

    losses: dict[str, float]
    images_per_second: float
    data_wait_share: float


@dataclass
class TrainMetrics:
    """A window of training steps on one rank.

    Losses stay on the device until `reduce`: reading one (`.item()`) would make the CPU wait for
    the GPU in every step.
    """

    images: int = 0  # of all ranks
    counted: int = 0  # of this rank, without rows that only fill up its batch
    waited_seconds: float = 0.0
    _began: float = field(default_factory=time.perf_counter)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _losses: list[tuple[int, list[str], Tensor]] = field(default_factory=list)

    def add(self, losses: Mapping[str, Tensor], *, prefix: str, rows: int) -> None:
        """Adds the mean losses of `rows` images, under names that begin with `prefix`."""
        for name, value in losses.items():
            key = prefix + name
            total = value.detach().double() * rows
            self._sums[key] = self._sums.get(key, torch.zeros_like(total)) + total

    def remember(self, loss: Tensor, *, step: int, keys: list[str]) -> None:
        """Keeps a loss with its samples, to name them if it turns out not to be finite."""
        self._losses.append((step, keys, loss.detach()))

    def reduce(self, world: World, *, step: int) -> WindowMeans:
        """Means over the window and all ranks. Called by all ranks, after `step` steps.

        Raises NotFiniteError on all ranks if one of them isn't finite.
        """
        # A rank whose rows were all padding has no names of its own; rank 0 always has some.
        names = distributed.broadcast(sorted(self._sums), world)
        zero = torch.zeros((), dtype=torch.float64, device=world.device)
        sums = torch.stack([self._sums.get(name, zero) for name in names])
        extra = torch.tensor([float(self.counted), self.waited_seconds], dtype=torch.float64)
        summed = distributed.all_sum(torch.cat([sums, extra.to(sums.device)]), world)
        *totals, counted, waited_seconds = summed.tolist()  # CPU-GPU sync point
        if not all(math.isfinite(value) for value in (*totals, counted, waited_seconds)):
            raise self._not_finite(world, step)
        seconds = time.perf_counter() - self._began
        return WindowMeans(
            {name: total / counted for name, total in zip(names, totals)},
            self.images / seconds,
            waited_seconds / world.size / seconds,
        )

    def _not_finite(self, world: World, step: int) -> NotFiniteError:
        """The error for the first step with such a loss on any rank."""
        own = next(
            ((s, keys) for s, keys, loss in self._losses if not bool(torch.isfinite(loss).all())),
            None,
        )
        gathered = distributed.gather(own, world)
        first = None
        if gathered is not None:
            first = min((found for found in gathered if found), key=lambda f: f[0], default=None)
        first = distributed.broadcast(first, world)
        step, keys = first or (step, [])
        more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
        return NotFiniteError(
            f"the loss is not finite at step {step + 1}, "
            f"in a batch with: {', '.join(keys[:SHOWN_KEYS])}{more}",
            hint="lower optim.model.lr, set train.clip_norm=1, or look at these samples; "
            "the last checkpoint is from before and can be resumed",
        )
