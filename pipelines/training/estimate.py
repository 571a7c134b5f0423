"""How long a training would take on this machine, and how much memory.

In: a `TrainingSetup`. Out: an `Estimate` from a few steps with a few images, which are trained and
thrown away. Must not know any service.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from pipelines.data.loading.loaders import TrainLoader, TrainStep
from pipelines.interfaces import NullEmit, World
from pipelines.training import worker
from pipelines.training.checkpoint_store import CheckpointFolder
from pipelines.training.setup import TrainingSetup
from pipelines.training.trainer import Trainer

IMAGES = 4
"""So many images a step are tried; times and memory of a larger batch follow from them."""
VALIDATION_SHARE = 1 / 3
"""Predicting an image takes about this share of training with it: forward without backward."""


@dataclass(frozen=True)
class Estimate:
    """`seconds` for all steps and validations, of which one step takes `step_seconds`, without the
    start of workers; `memory_bytes` of each worker for weights, gradients, optimizer and
    activations, without the libraries and the cached images. `device` is where it was measured."""

    seconds: float
    step_seconds: float
    memory_bytes: int
    device: str


def estimate(setup: TrainingSetup) -> Estimate:
    """Trains two steps of `IMAGES` images on this machine's GPU, if there is one, or on as many CPU
    cores as a worker has, and times the second. Raises TesseraError if a step fails."""
    recipe, samples = setup.recipe, setup.card.split("train").samples
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    images = min(IMAGES, recipe.train.batch_size, samples)
    small = recipe.with_overrides(
        {
            "train.batch_size": images,
            "train.epochs": 1,
            "train.accumulate": 1,
            "checkpoint.every_steps": 0,
            "data.cache": "none",
            "data.loader_workers": 0,
        }
    )
    tried = replace(setup, recipe=small)
    loader = _FirstSteps(worker.train_loader(tried, World(device=device)))
    with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
        trainer = Trainer(
            setup=tried,
            loader=loader,
            validate=lambda module, epoch: {},
            world=World(device=device),
            emit=NullEmit(),
            store=CheckpointFolder(Path(folder), NullEmit(), keep=1),
        )
        with _threads(recipe.workers.cpus if recipe.workers.largest else None):
            trainer.train_epoch()
    loader.close()
    batch = min(recipe.train.batch_size, samples)
    workers = max(1, recipe.workers.smallest)
    share = batch / workers / images  # of what was tried
    state = _state_bytes(trainer)
    step_seconds = loader.seconds * share
    steps = -(-samples // recipe.train.batch_size) * recipe.train.epochs
    val = setup.card.splits["val"].samples if "val" in setup.card.splits else 0
    validation = loader.seconds / images * VALIDATION_SHARE * val / workers * recipe.train.epochs
    weights = {parameter.data_ptr() for parameter in trainer.module.parameters()}
    activations = sum(size for address, size in loader.kept.items() if address not in weights)
    return Estimate(
        seconds=steps * step_seconds + validation,
        step_seconds=step_seconds,
        memory_bytes=int(state + activations * share / recipe.train.accumulate),
        device=torch.cuda.get_device_name() if device != "cpu" else "CPU",
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of threads within this block, unless `count` is None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _FirstSteps:
    """The first two steps of a loader's epoch. `seconds` is what the second took, and `kept` are
    the bytes of each tensor that it kept for the backward pass, by address."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader, self.samples = loader, loader.samples
        self.seconds = 0.0
        self.kept: dict[int, int] = {}

    def epoch(self, epoch: int, consumed: int = 0) -> Iterator[TrainStep]:
        for step in islice(self._loader.epoch(epoch, consumed), 2):
            self.kept.clear()
            began = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield step
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - began

    def close(self) -> None:
        self._loader.close()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor


def _state_bytes(trainer: Trainer) -> int:
    """Weights, their gradients, the optimizers' state, and the moving average."""
    weights: int = sum(t.nbytes for t in trainer.module.state_dict().values())
    gradients: int = sum(p.nbytes for p in trainer.module.parameters() if p.requires_grad)
    moments: int = sum(
        value.nbytes
        for optimizer in trainer.optimizers.values()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return weights * (2 if trainer.ema else 1) + gradients + moments
