"""Errors of a step that would occur again, in words that say what to change.

In: an error of PyTorch in a step. Out: a TesseraError, which ends the training, where another
attempt of the workers would fail in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from models.core.errors import TesseraError
from models.core.family import Batch
from pipelines.data.loading.loaders import TrainStep
from pipelines.interfaces import World
from pipelines.training.hardware import is_out_of_memory


@contextmanager
def explain_memory_error(step: TrainStep, world: World) -> Iterator[None]:
    """Raises TesseraError for memory that could not be allocated."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        device = "GPU" if world.device.startswith("cuda") else "machine"
        raise TesseraError(
            f"the memory of the {device} is too small for a step with {len(step.batch['key'])} "
            f"images on rank {world.rank}",
            hint="use smaller images, a smaller --batch-size, or --set train.accumulate=2 or more, "
            "which makes a step in pieces",
        ) from error


@contextmanager
def explain_norm_error(batch: Batch) -> Iterator[None]:
    """Raises TesseraError for a norm over a single value."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TesseraError(
            f"a rank has {len(batch['key'])} image of a batch, and the network can't normalise "
            "over it: its feature maps have shrunk to one pixel",
            hint="choose train.batch_size so that the last batch of an epoch has several images "
            "for each worker, or a smaller train.accumulate, or larger images (data.height)",
        ) from None
