"""What a training is seen by: samples as the network gets them, the same few validation images after
each epoch, the worst mistakes.

In: a data set, a network to ask, records. Out: PNG files in the run's folder and events that name
them. Must not know any task. Only rank 0 draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.core.family import Batch, DataSpec, Family, Panel
from pipelines.data.card import Card
from pipelines.data.loading.loaders import EvalLoader
from pipelines.interfaces import Emit, World
from pipelines.recipe import Recipe
from pipelines.training.evaluator import Evaluator, Predictions
from pipelines.visuals import plots

FOLDER, EPOCHS = "pictures", "epochs"
SHOWN = 8
"""Validation images that are shown again and again."""
MOST_EPOCHS = 20
"""Of a longer training only so many epochs are shown, evenly spread, and the last."""
WORST = 24
BESIDE = 4
"""Related images beside one."""


class PreviewLogger:
    """Draws for one training."""

    def __init__(
        self,
        family: Family[Any],
        recipe: Recipe,
        card: Card,
        data: DataSpec,
        run_dir: Path,
        emit: Emit,
    ) -> None:
        self._family, self._recipe, self._card, self._data = family, recipe, card, data
        self._run_dir, self._emit = run_dir, emit
        samples = card.split("val").samples
        places = np.linspace(0, samples - 1, min(SHOWN, samples)).round().astype(np.int64)
        self._shown = np.unique(places)

    def training_samples(self, batch: Batch) -> None:
        """A batch as the network sees it."""
        few = {name: value[:32] for name, value in batch.items()}
        groups = self._family.task.sample_panels(few, self._data)
        self._draw(groups, "training_samples")

    def epoch(self, number: int, ask: Evaluator, answers: Predictions) -> None:
        """The same validation images after epoch `number`, counted from 1."""
        epochs = self._recipe.train.epochs
        every = -(-epochs // MOST_EPOCHS)
        if number % every and number != epochs:
            return
        groups = self._groups(self._shown, ask, answers)
        path = self._path(f"{EPOCHS}/val-{number:05d}")
        plots.grid(groups, self._data.classes, path)
        where = f"{FOLDER}/{EPOCHS}/{path.name}"
        time_ms = time.time_ns() // 1_000_000
        # MLflow puts a series beside that of other runs, but a single picture it shows larger.
        self._emit(
            {"kind": "image", "path": where, "key": "val", "step": number, "time_ms": time_ms}
        )
        self._emit({"kind": "artifact", "path": where, "folder": f"{FOLDER}/{EPOCHS}"})

    def outcome(self, ask: Evaluator, answers: Predictions) -> None:
        """The worst mistakes, and which classes are taken for which."""
        worst = answers.worst(self._family, WORST)
        groups = self._groups(np.array([answers.indices[i] for i in worst]), ask, answers)
        self._draw(groups, "worst_mistakes")
        matrix = self._family.task.confusion(answers.records, self._data)
        if matrix is not None:
            path = self._path("confusion_matrix")
            plots.confusion_matrix(matrix, self._data.classes, path)
            self._announce(path)

    def _groups(
        self, samples: np.ndarray[Any, Any], ask: Evaluator, answers: Predictions
    ) -> list[list[Panel]]:
        """Panels of samples of the validation split, by their numbers."""
        return groups_of(self._family, self._data, self._batches, ask, answers, samples)

    def _batches(self, samples: np.ndarray[Any, Any]) -> list[Batch]:
        if not len(samples):
            return []
        loader = EvalLoader(
            self._recipe.data.path,
            self._card,
            self._data,
            batch_size=self._family.task.eval_batch,
            world=World(),
            split="val",
            only=samples,
            fit=self._recipe.data.fit,
            cache="none",
        )
        return [batch for _, batch in loader.batches()]

    def _draw(self, groups: list[list[Panel]], name: str) -> None:
        path = self._path(name)
        plots.grid(groups, self._data.classes, path)
        self._announce(path)

    def _announce(self, path: Path) -> None:
        self._emit({"kind": "artifact", "path": f"{FOLDER}/{path.name}", "folder": FOLDER})

    def _path(self, name: str) -> Path:
        return self._run_dir / FOLDER / f"{name}.png"


def groups_of(
    family: Family[Any],
    data: DataSpec,
    read: Callable[[np.ndarray[Any, Any]], list[Batch]],
    ask: Evaluator,
    answers: Predictions,
    samples: np.ndarray[Any, Any],
) -> list[list[Panel]]:
    """What to look at of samples, by their numbers in the split that `answers` are of; `read`
    gives batches of samples."""
    task = family.task
    groups = []
    for batch in read(samples):
        predictions, targets = ask(batch)
        for row, (prediction, target) in enumerate(zip(predictions, targets)):
            groups.append(task.panels(_cut(batch, row), prediction, target, data))
    positions = {index: position for position, index in enumerate(answers.indices)}
    for sample, group in zip(samples.tolist(), groups):
        related = task.related_images(answers.records, positions[sample])[:BESIDE]
        others = np.array([answers.indices[position] for position, _ in related], np.int64)
        captions = iter(caption for _, caption in related)
        for batch in read(others):
            group += [Panel(_cut(batch, row), next(captions)) for row in range(len(batch["key"]))]
    return groups


def _cut(batch: Batch, row: int) -> Any:
    """The image without what was added to fill the frame, uint8 (C, H, W)."""
    height, width = batch["extent"][row].tolist()
    return batch["image"][row, :, :height, :width]
