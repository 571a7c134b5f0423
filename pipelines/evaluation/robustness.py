"""The primary metric of a model on corrupted and on attacked images.

In: a loaded model and a number of images of a split. Out: `Robustness`. Must not know how images
are corrupted or attacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from models.core.family import Batch, Prediction, Target
from pipelines.data.loading.loaders import EvalLoader
from pipelines.evaluation import attacks, corruptions
from pipelines.evaluation.results import Robustness
from pipelines.interfaces import World
from pipelines.training import evaluator
from pipelines.training.loaded_model import LoadedModel

EPSILONS = (2, 8)
"""Strengths of the attacks: the largest change of a channel's value, of 255 levels."""


def measure(
    model: LoadedModel,
    split: str,
    count: int,
    world: World,
    *,
    metrics: Sequence[str] = (),
    primary: str,
) -> Robustness | None:
    """Called by all ranks. Returns None for a count of 0, and if the target is the image itself.

    Measures the metric `primary`, which is one of the task's or of `metrics`, MODULE:FUNCTION. Uses
    `count` images, evenly spread over the split; only rank 0 has the values.
    """
    family, data = model.family, model.data
    if not count or family.task.reads == "images":
        return None
    samples = model.card.split(split).samples
    chosen = np.unique(np.linspace(0, samples - 1, min(count, samples)).round().astype(np.int64))

    def metric(predict_batch: evaluator.PredictBatch, loader: evaluator.Loader) -> float:
        predictions = evaluator.predict_split(family, predict_batch, data, loader, world)
        if predictions is None:
            return 0.0
        return predictions.metrics(family, data, metrics)[primary]

    def loader() -> EvalLoader:
        return model.loader(split, world, only=chosen)

    clean = metric(model.evaluator, loader())
    corrupted = {
        kind: tuple(
            metric(model.evaluator, _CorruptedLoader(loader(), kind, strength))
            for strength in corruptions.STRENGTHS
        )
        for kind in corruptions.kinds_for(data.channels)
    }
    attacked = {}
    if family.task.name == "classification":
        for kind in attacks.KINDS:
            for epsilon in EPSILONS:
                attack = _AttackedEvaluator(model, kind, epsilon)
                attacked[f"{kind}_{epsilon}"] = metric(attack, loader())
    return Robustness(len(chosen), clean, corrupted, attacked)


class _CorruptedLoader:
    """The batches of a loader with corrupted images."""

    def __init__(self, loader: EvalLoader, kind: str, strength: int) -> None:
        self._loader, self._kind, self._strength = loader, kind, strength

    def batches(self) -> Iterator[tuple[int, Batch]]:
        for number, batch in self._loader.batches():
            images = corruptions.corrupt(
                batch["image"],
                self._kind,
                self._strength,
                batch["index"].tolist(),
                batch["extent"],
            )
            yield number, {**batch, "image": images}


class _AttackedEvaluator:
    """Predicts images that were changed to mislead the network."""

    def __init__(self, model: LoadedModel, kind: str, epsilon: int) -> None:
        self._model, self._kind, self._epsilon = model, kind, epsilon

    def __call__(self, batch: Batch) -> tuple[list[Prediction], list[Target]]:
        model = self._model
        transformed = model.evaluator.transform(batch)
        transformed["image"] = attacks.attack(
            model.family,
            model.module,
            transformed,
            model.data,
            self._kind,
            self._epsilon / 255,
        )
        return model.evaluator.predict_transformed(transformed, batch)
