"""Finds samples of a packed data set whose label is probably wrong, with a trained classifier.

In: a packed data set, and a registered model. Out: `LabelSuspects`. Must not print, nor read the
environment.

Predictions of samples that the model was trained on say little about their labels: a network learns
wrong ones, too. So the train split is left out by default if the model was trained on it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.data.card import Card
    from pipelines.data.inspection.suspects import Suspect
    from pipelines.interfaces import Version, World
    from pipelines.training.loaded_model import LoadedModel
    from pipelines.workflows.context import Context

TRAINED_ON = "train"
"""The split that a model learns."""


@dataclass(frozen=True)
class LabelSuspects:
    """The result of `find_label_suspects`.

    Args:
        suspects: Of all splits, that of the largest margin first.
        splits: The splits that were searched.
        samples: How many samples these have.
        notes: What is known of the samples that the model was trained on.
        version: The model.
    """

    suspects: tuple[Suspect, ...]
    splits: tuple[str, ...]
    samples: int
    notes: tuple[str, ...]
    version: Version


def find_label_suspects(
    data: str | os.PathLike[str],
    model: str | Version,
    *,
    splits: Sequence[str] = (),
    device: str = "cpu",
    context: Context | None = None,
) -> LabelSuspects:
    """Finds labels that are probably wrong by confident learning.

    Args:
        data: A packed data set: a folder, an address or what `pack` returned.
        model: A reference (`NAME`, `NAME/2`, `NAME@champion`) or a version of a classifier.
        splits: The splits to search; by default all that the model wasn't trained on.
        device: Where the network runs: `cpu`, `cuda`, `cuda:1`.
        context: Where MLflow is; from the environment by default.

    Raises TesseraError if a model, the data set or a split doesn't exist, if the model is no
    classifier, or if it knows other classes.
    """
    from pipelines.data import card as cards
    from pipelines.interfaces import World
    from pipelines.storage.base import absolute_location
    from pipelines.training import loaded_model
    from pipelines.workflows import model_reference, services
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    location = absolute_location(os.fspath(data))
    card = cards.read(location)
    for split in splits:
        card.split(split)
    registry = services.open_registry(context)
    version = model_reference.resolve(registry, model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry.download(version, Path(scratch))
        digest = services.registered_digest(version)
        loaded = loaded_model.load_model(folder, digest, location, World(device=device))
    _check_task(loaded, version)
    known = _is_known(card, loaded.model.card)
    chosen = tuple(dict.fromkeys(splits)) or _choose_splits(card, known)
    found = [one for split in chosen for one in _search(loaded, split, World(device=device))]
    found.sort(key=lambda one: -one.margin)
    samples = sum(card.split(split).samples for split in chosen)
    notes = tuple(_notes(chosen, loaded.model.card, known))
    return LabelSuspects(tuple(found), chosen, samples, notes, version)


def _check_task(loaded: LoadedModel, version: Version) -> None:
    from models.core.errors import UsageError

    task = loaded.family.task
    if task.name != "classification":
        raise UsageError(
            f"models:/{version.name}/{version.number} is for {task.name.replace('_', ' ')}, and "
            "suspects are found with a classifier",
            hint="name a classification model that was trained on the same classes",
        )


def _is_known(card: Card, trained: Card) -> bool:
    """Whether the model was trained on this data set, or on another version of it: one of the two
    was made from the other, or both from the same, by corrections."""
    versions, others = (
        {one.digest, *(made.data_digest for made in one.corrections)} for one in (card, trained)
    )
    return bool(versions & others)


def _choose_splits(card: Card, known: bool) -> tuple[str, ...]:
    from models.core.errors import TesseraError
    from pipelines.data.inspection import survey

    splits = tuple(name for name in survey.ordered(card) if not known or name != TRAINED_ON)
    if not splits:
        raise TesseraError(
            f"{card.name} has only a train split, which the model was trained on",
            hint="--split train searches it all the same",
        )
    return splits


def _notes(splits: Sequence[str], trained: Card, known: bool) -> list[str]:
    if not known:
        return [
            f"the model was trained on another data set, {trained.name} (digest "
            f"{trained.digest}): whether it has images of this one isn't known"
        ]
    if TRAINED_ON in splits:
        return [
            "the model was trained on these train images, and may have learned their wrong labels: "
            "many are missed. To search all images with models that haven't seen them, pack the "
            "source with several values of --seed, train on each, and search val and test of each"
        ]
    return []


def _search(loaded: LoadedModel, split: str, world: World) -> list[Suspect]:
    import torch

    from pipelines.data.inspection.suspects import Suspect, find_suspects
    from pipelines.training import evaluator

    predictions = evaluator.predict_split(
        loaded.family, loaded.evaluator, loaded.data, loaded.loader(split, world), world
    )
    assert predictions is not None
    records, classes = predictions.records, loaded.card.classes
    probabilities = torch.stack([record["probabilities"] for record in records]).numpy()
    labels = torch.tensor([record["label"] for record in records]).numpy()
    return [
        Suspect(
            split=split,
            key=predictions.keys[one.position],
            label=classes[records[one.position]["label"]],
            suggested=classes[one.label],
            margin=one.margin,
        )
        for one in find_suspects(probabilities, labels)
    ]
