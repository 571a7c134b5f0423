"""Registers the best checkpoint of a run as a model version.

In: a run, its best checkpoint, a tracker and a registry. Out: a `Version` with the alias
`challenger`. Must not know MLflow.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import models
from models.core.family import DataSpec
from pipelines import tag_names
from pipelines.interfaces import Registry, Tracker, Version
from pipelines.training import checkpoints
from pipelines.training.checkpoints import State
from pipelines.training.payload import TrainingSummary
from pipelines.training.run import MODEL, Run
from pipelines.training.setup import data_spec

if TYPE_CHECKING:
    from torch import nn

CHALLENGER = "challenger"
COPIED_TAGS = (tag_names.SEARCH, tag_names.TRIAL)
"""Tags of a run that its model version gets too: where its settings come from."""
MAX_TAG_CHARACTERS = 4000


class SaveExportable(Protocol):
    """Writes the form of a model that needs no Tessera, as MLflow's PyTorch flavour. Returns the
    reason if the model can't be written in that form, else None."""

    def __call__(
        self, module: nn.Module, example: Any, target: Path, /, *, metadata: dict[str, Any]
    ) -> str | None: ...


def register(
    run: Run,
    best: Path,
    summary: TrainingSummary,
    tracker: Tracker,
    registry: Registry,
    save_exportable: SaveExportable,
    run_tags: Mapping[str, str],
) -> Version:
    """Registers the checkpoint in the folder `best`. Idempotent: a checkpoint that has a version
    already keeps it, so a failed call can be repeated."""
    for version in registry.versions(run.model):
        if (version.tags.get(tag_names.RUN), version.tags.get(tag_names.CHECKPOINT)) == (
            run.name,
            best.name,
        ):
            return version
    target = run.folder / MODEL
    if target.exists():  # left by a driver that died while registering
        shutil.rmtree(target)
    state = checkpoints.load(best)
    data = data_spec(state.recipe, state.card)
    reason = _export(state, data, target, save_exportable)
    # After the export: the digest covers its files too.
    digest = checkpoints.write_model(best, target)
    tags = {
        **_version_tags(state, data),
        tag_names.DIGEST: digest,
        tag_names.METRICS: json.dumps({f"val/{k}": v for k, v in summary.metrics.items()}),
        tag_names.RUN: run.name,
        tag_names.CHECKPOINT: best.name,
        tag_names.SERVABLE: f"no: {reason}" if reason else "mlflow.pytorch",
        **{name: run_tags[name] for name in COPIED_TAGS if name in run_tags},
    }
    version = registry.register(
        run.model, target, run_id=tracker.run_id, tags=tags, step=summary.step
    )
    registry.alias(run.model, CHALLENGER, version.number)
    return registry.version(run.model, version.number)


def _export(
    state: State, data: DataSpec, target: Path, save_exportable: SaveExportable
) -> str | None:
    """Writes the exportable form into `target`; returns the reason if there is none."""
    import numpy as np

    family = models.get(state.recipe.family)
    module = family.build(state.recipe.config(), data)
    module.load_state_dict(state.weights)
    exportable = family.exportable(module.eval(), data)
    if exportable is None:
        return f"a prediction of {state.recipe.family} is not a single tensor"
    example = np.zeros((2, data.height, data.width, data.channels), np.uint8)
    metadata = {"classes": list(data.classes), "task": family.task.name}
    return save_exportable(exportable, example, target, metadata=metadata)


def _version_tags(state: State, data: DataSpec) -> dict[str, str]:
    """What a version says about its family, settings and data."""
    recipe, card = state.recipe, state.card
    return {
        tag_names.FAMILY: recipe.family,
        tag_names.VARIANT: recipe.variant,
        tag_names.RECIPE: json.dumps(recipe.model_dump(mode="json"), sort_keys=True),
        tag_names.DATA_DIGEST: card.digest,
        tag_names.DATA_NAME: card.name,
        tag_names.CLASSES: _short_list(card.classes),
        tag_names.PREPROCESSING: json.dumps(asdict(replace(data, classes=())), sort_keys=True),
    }


def _short_list(names: Sequence[str]) -> str:
    listed = json.dumps(list(names))
    return listed if len(listed) <= MAX_TAG_CHARACTERS else f"{len(names)} classes; see card.json"
