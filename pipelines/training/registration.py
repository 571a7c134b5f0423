"""Registers the best checkpoint of a run as a model version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import models
from pipelines import tag_names
from pipelines.interfaces import Registry, Tracker, Version
from pipelines.training import checkpoints
from pipelines.training.run import Run

CHALLENGER = "challenger"


ORIGIN = (tag_names.SEARCH, tag_names.TRIAL)
"""Tags of a run that say where its settings come from: its version has them, too."""


SaveExportable = Callable[..., str | None]
"""Writes the form of a model that other tools read; gives the reason where it couldn't."""


def _register(
    run: Run,
    best: Path,
    summary: Mapping[str, Any],
    tracker: Tracker,
    registry: Registry,
    save_exportable: SaveExportable,
    origin: Mapping[str, str],
) -> Version:
    for version in registry.versions(run.model):  # it was resumed after it had been registered
        if (version.tags.get(tag_names.RUN), version.tags.get(tag_names.CHECKPOINT)) == (
            run.name,
            best.name,
        ):
            return version
    target = run.folder / "model"
    if target.exists():  # left by a driver that died while registering
        shutil.rmtree(target)
    state = checkpoints.load(best)
    recipe, card = state.recipe, state.card
    family = models.get(recipe.family)
    data = card.spec(recipe.data.height, recipe.data.width, reads=family.task.reads)
    module = family.build(recipe.config(), data)
    module.load_state_dict(state.weights)
    exportable = family.exportable(module.eval(), data)
    reason: str | None = f"{recipe.family} has no answer that is one tensor"
    if exportable is not None:
        import numpy as np

        example = np.zeros((2, data.height, data.width, data.channels), np.uint8)
        metadata = {"classes": list(data.classes), "task": family.task.name}
        reason = save_exportable(exportable, example, target, metadata=metadata)
    digest = checkpoints.write_model(best, target)
    tags = {
        tag_names.DIGEST: digest,
        tag_names.FAMILY: recipe.family,
        tag_names.VARIANT: recipe.variant,
        tag_names.RECIPE: json.dumps(recipe.model_dump(mode="json"), sort_keys=True),
        tag_names.DATA_DIGEST: card.digest,
        tag_names.DATA_NAME: card.name,
        tag_names.CLASSES: _short_list(card.classes),
        tag_names.PREPROCESSING: json.dumps(asdict(replace(data, classes=())), sort_keys=True),
        tag_names.METRICS: json.dumps({f"val/{k}": v for k, v in summary["metrics"].items()}),
        tag_names.RUN: run.name,
        tag_names.CHECKPOINT: best.name,
        tag_names.SERVABLE: f"no: {reason}" if reason else "mlflow.pytorch",
        **{name: origin[name] for name in ORIGIN if name in origin},
    }
    version = registry.register(
        run.model, target, run_id=tracker.run_id, tags=tags, step=summary["step"]
    )
    registry.alias(run.model, CHALLENGER, version.number)
    return registry.version(run.model, version.number)


def _short_list(names: Sequence[str]) -> str:
    listed = json.dumps(list(names))
    return listed if len(listed) <= 4000 else f"{len(names)} classes; see card.json"
