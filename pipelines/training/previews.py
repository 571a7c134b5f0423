"""Images of a training: the first batch as the network sees it, the same few validation images
after each epoch, and the worst mistakes of the best checkpoint.

In: a `TrainingSetup`, a network that predicts, its predictions. Out: PNG files in the run's folder
and events that name them. Must not know any task. Only rank 0 draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from models.core.family import Batch, DataSpec, Family, Panel
from pipelines.data.loading.loaders import EvalLoader
from pipelines.interfaces import Emit, World
from pipelines.training.evaluator import PredictBatch, Predictions
from pipelines.training.run import PICTURES
from pipelines.training.setup import TrainingSetup
from pipelines.visuals import confusion, plots

Indices: TypeAlias = np.ndarray[Any, Any]
"""Positions of samples in a split: int64 (N,)."""

EPOCHS_FOLDER = "epochs"
VALIDATION_IMAGES = 8
"""Validation images that are drawn after each epoch."""
MAX_EPOCHS = 20
"""A longer training is drawn after so many epochs only, evenly spread, and after the last."""
TRAINING_IMAGES = 32
WORST_IMAGES = 24
MAX_RELATED = 4
"""Related images that are drawn beside one."""


class PreviewLogger:
    """Draws the previews of one training."""

    def __init__(self, setup: TrainingSetup, run_dir: Path, emit: Emit) -> None:
        self._setup, self._run_dir, self._emit = setup, run_dir, emit
        samples = setup.card.split("val").samples
        spread = np.linspace(0, samples - 1, min(VALIDATION_IMAGES, samples))
        self._indices = np.unique(spread.round().astype(np.int64))

    def training_samples(self, batch: Batch) -> None:
        """Draws a transformed batch."""
        few = {name: value[:TRAINING_IMAGES] for name, value in batch.items()}
        panels = self._setup.family.task.sample_panels(few, self._setup.data)
        self._log_grid(panels, "training_samples")

    def epoch(self, number: int, predict_batch: PredictBatch, predictions: Predictions) -> None:
        """Draws the same validation images after epoch `number`, counted from 1."""
        epochs = self._setup.recipe.train.epochs
        every = -(-epochs // MAX_EPOCHS)
        if number % every and number != epochs:
            return
        panels = self._panels(self._indices, predict_batch, predictions)
        path = self._path(f"{EPOCHS_FOLDER}/val-{number:05d}")
        plots.grid(panels, self._setup.data.classes, path)
        relative = f"{PICTURES}/{EPOCHS_FOLDER}/{path.name}"
        time_ms = time.time_ns() // 1_000_000
        # Logged twice: MLflow compares a series of images between runs, but shows a single file
        # larger.
        self._emit(
            {"kind": "image", "path": relative, "key": "val", "step": number, "time_ms": time_ms}
        )
        self._emit_artifact(relative, f"{PICTURES}/{EPOCHS_FOLDER}")

    def outcome(self, predict_batch: PredictBatch, predictions: Predictions) -> None:
        """Draws the worst mistakes, and the confusion matrix where the task has one."""
        task, data = self._setup.family.task, self._setup.data
        worst = predictions.worst(self._setup.family, WORST_IMAGES)
        indices = np.array([predictions.indices[position] for position in worst])
        self._log_grid(self._panels(indices, predict_batch, predictions), "worst_mistakes")
        matrix = task.confusion(predictions.records, data)
        if matrix is not None:
            path = self._path("confusion_matrix")
            confusion.confusion_matrix(matrix, data.classes, path)
            self._emit_artifact(f"{PICTURES}/{path.name}", PICTURES)

    def _panels(
        self, indices: Indices, predict_batch: PredictBatch, predictions: Predictions
    ) -> list[list[Panel]]:
        """One group of panels for each sample of the validation split."""
        setup = self._setup
        return panels_of(setup.family, setup.data, self._read, predict_batch, predictions, indices)

    def _read(self, indices: Indices) -> list[Batch]:
        if not len(indices):
            return []
        setup = self._setup
        loader = EvalLoader(
            setup.recipe.data.path,
            setup.card,
            setup.data,
            batch_size=setup.family.task.eval_batch,
            world=World(),
            split="val",
            only=indices,
            fit=setup.recipe.data.fit,
            cache="none",
        )
        return [batch for _, batch in loader.batches()]

    def _log_grid(self, panels: list[list[Panel]], name: str) -> None:
        path = self._path(name)
        plots.grid(panels, self._setup.data.classes, path)
        self._emit_artifact(f"{PICTURES}/{path.name}", PICTURES)

    def _emit_artifact(self, path: str, folder: str) -> None:
        self._emit({"kind": "artifact", "path": path, "folder": folder})

    def _path(self, name: str) -> Path:
        return self._run_dir / PICTURES / f"{name}.png"


def panels_of(
    family: Family[Any],
    data: DataSpec,
    read: Callable[[Indices], list[Batch]],
    predict_batch: PredictBatch,
    predictions: Predictions,
    indices: Indices,
) -> list[list[Panel]]:
    """One group of panels for each of the samples at `indices`: image, prediction and truth, then
    related images.

    Args:
        read: Reads samples of the split by their positions.
        predictions: Of the whole split.
    """
    task = family.task
    groups = []
    for batch in read(indices):
        predicted, targets = predict_batch(batch)
        for row, (prediction, target) in enumerate(zip(predicted, targets)):
            groups.append(task.panels(_image(batch, row), prediction, target, data))
    positions = {index: position for position, index in enumerate(predictions.indices)}
    for index, group in zip(indices.tolist(), groups):
        related = task.related_images(predictions.records, positions[index])[:MAX_RELATED]
        others = np.array([predictions.indices[position] for position, _ in related], np.int64)
        captions = iter(caption for _, caption in related)
        for batch in read(others):
            group += [Panel(_image(batch, row), next(captions)) for row in range(len(batch["key"]))]
    return groups


def _image(batch: Batch, row: int) -> Tensor:
    """The image without the padding of its frame, uint8 (C, H, W)."""
    height, width = batch["extent"][row].tolist()
    image: Tensor = batch["image"][row, :, :height, :width]
    return image
