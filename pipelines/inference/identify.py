"""Identifies images by their embeddings.

In: a predictor of embeddings; a folder with a subfolder of images for each name. Out: for a
prediction, the nearest names. Must not know where the network comes from or where the results go.

    G names, D numbers of an embedding
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.core.errors import TesseraError, UsageError
from models.core.family import Prediction
from pipelines.data.image_reading import ImageReading
from pipelines.data.sources import find_folders, find_images
from pipelines.inference.predictor import Predictor

SHOWN = 5
Identify = Callable[[Prediction], dict[str, Any]]


def build_gallery(
    predictor: Predictor,
    folder: Path,
    threshold: float | None,
    reading: ImageReading | None = None,
) -> Identify:
    """Computes a prototype per name in `folder`: the normalised mean of its images' embeddings.

    The returned function maps a prediction to `class`, the nearest name, `similarity` to it
    (cosine), `known`, whether that is at least `threshold` (left out if that is None), and `top5`,
    the five nearest. Raises UsageError for a model without embeddings and a folder without names,
    and TesseraError for an image that can't be read.
    """
    _check(predictor)
    folders = find_folders(folder)
    if not folders:
        raise UsageError(
            f"{folder} has no subfolders",
            hint="put the images of each name into a folder of that name",
        )
    names = [one.name for one in folders]
    prototypes = torch.stack([_prototype(predictor, one, reading) for one in folders])

    def identify(prediction: Prediction) -> dict[str, Any]:
        similarities = prototypes @ prediction["embedding"]
        order = similarities.argsort(descending=True, stable=True)[:SHOWN].tolist()
        top5 = [{"class": names[i], "similarity": float(similarities[i])} for i in order]
        known = {} if threshold is None else {"known": top5[0]["similarity"] >= threshold}
        return {**top5[0], **known, "top5": top5}

    return identify


class PairSimilarity:
    """Maps each prediction after the first to its `similarity` to the first (cosine), and to
    `same`, whether that is at least `threshold` (left out if that is None)."""

    def __init__(self, predictor: Predictor, threshold: float | None) -> None:
        """Raises UsageError for a model without embeddings."""
        _check(predictor)
        self._threshold = threshold
        self._first: Tensor | None = None

    def __call__(self, prediction: Prediction) -> dict[str, Any]:
        if self._first is None:
            self._first = prediction["embedding"]
            return {}
        similarity = float(self._first @ prediction["embedding"])
        if self._threshold is None:
            return {"similarity": similarity}
        return {"similarity": similarity, "same": similarity >= self._threshold}


def _check(predictor: Predictor) -> None:
    if predictor.task.name != "verification":
        raise UsageError(
            f"the task of this model is {predictor.task.name.replace('_', ' ')}: "
            "it has no embeddings",
            hint="train a model with embeddings: tessera train embedding --data DIR",
        )


def _prototype(predictor: Predictor, folder: Path, reading: ImageReading | None) -> Tensor:
    """(D,) of unit length."""
    paths = [folder / name for name in find_images(folder)]
    if not paths:
        raise TesseraError(f"{folder} has no images", hint="add some, or remove the folder")
    total = torch.zeros(())
    for result in predictor.predict(paths, reading):
        if result.prediction is None:
            raise TesseraError(str(result.output["error"]), hint="repair or remove it")
        total = total + result.prediction["embedding"].double()
    return F.normalize(total, dim=0).float()
