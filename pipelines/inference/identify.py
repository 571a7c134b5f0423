"""Who is it? Embeddings compared with those of known ones.

In: a predictor that embeds; a folder with a subfolder of images for each name. Out: for an embedding,
whose it is nearest to. Must not know where the network came from or where the answers go.

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
from pipelines.data.sources import find_folders, find_images
from pipelines.inference.predictor import Predictor

SHOWN = 5
Identify = Callable[[Prediction], dict[str, Any]]


def build_gallery(predictor: Predictor, folder: Path, threshold: float | None) -> Identify:
    """Learns the names in `folder`, each from the normalised mean of its images' embeddings.

    What is given tells of a prediction `class`, the nearest name, `similarity` to it (a cosine),
    `known`, whether that is at least `threshold` (left out where that is None), and `top5`, the five
    nearest. Raises UsageError for a model that gives no embeddings and a folder without names,
    TesseraError for an image that can't be read."""
    _check(predictor)
    folders = find_folders(folder)
    if not folders:
        raise UsageError(
            f"{folder} has no folders", hint="put the images of each into a folder of its name"
        )
    names = [place.name for place in folders]
    prototypes = torch.stack([_prototype(predictor, place) for place in folders])

    def identify(prediction: Prediction) -> dict[str, Any]:
        likeness = prototypes @ prediction["embedding"]
        order = likeness.argsort(descending=True, stable=True)[:SHOWN].tolist()
        top5 = [{"class": names[i], "similarity": float(likeness[i])} for i in order]
        known = {} if threshold is None else {"known": top5[0]["similarity"] >= threshold}
        return {**top5[0], **known, "top5": top5}

    return identify


class PairSimilarity:
    """Tells of each prediction after the first `similarity` to that (a cosine), and `same`, whether
    it is at least `threshold` (left out where that is None)."""

    def __init__(self, predictor: Predictor, threshold: float | None) -> None:
        """Raises UsageError for a model that gives no embeddings."""
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
            f"this model does {predictor.task.name.replace('_', ' ')}: its answers can't be compared",
            hint="train one that gives embeddings: tessera train embedding --data DIR",
        )


def _prototype(predictor: Predictor, folder: Path) -> Tensor:
    """(D,) of unit length."""
    paths = [folder / name for name in find_images(folder)]
    if not paths:
        raise TesseraError(f"{folder} has no images", hint="put some in, or remove the folder")
    total = torch.zeros(())
    for found in predictor.predict(paths):
        if found.prediction is None:
            raise TesseraError(str(found.output["error"]), hint="mend or remove it")
        total = total + found.prediction["embedding"].double()
    return F.normalize(total, dim=0).float()
