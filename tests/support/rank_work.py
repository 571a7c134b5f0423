"""Functions that tests run on each rank; see `gloo_ranks.py`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pipelines import recipe as recipes
from pipelines.evaluation import job, results
from pipelines.evaluation.payload import EvaluationPayload, ModelFiles
from pipelines.interfaces import Emit, NullEmit, World
from pipelines.recipe import Recipe
from pipelines.storage.retry import RetryPolicy
from pipelines.tracking.events import EventLog, read_events
from pipelines.tracking.published_log import PublishedEventLog
from pipelines.training import worker
from pipelines.training.payload import TrainingPayload
from pipelines.training.setup import open_setup


def payload_for(recipe: Recipe, run_dir: Path, **more: Any) -> TrainingPayload:
    """The payload that a driver sends to the workers."""
    setup = open_setup(recipe)
    return TrainingPayload(setup.recipe, setup.card, run_dir, **more)


def train(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    """Trains; returns the losses by step and the worker's summary."""
    run_dir = Path(payload["run_dir"])
    log = run_dir / "events.jsonl"
    emit = EventLog(log) if world.leads else NullEmit()
    recipe = recipes.build(json.loads(payload["recipe"]))
    summary = worker.run(payload_for(recipe, run_dir), world, emit)
    losses = [
        event["values"]["train/loss"]
        for event, _ in read_events(log)
        if "train/loss" in event.get("values", {})
    ]
    return {"losses": losses, **dataclasses.asdict(summary)}


def train_apart(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    """Trains on machines that share no folder, but `payload["storage"]`; without one, they share
    the folder of machine 0. Returns the worker's summary."""
    storage = payload["storage"]
    run_dir = Path(payload["home"]) / f"machine-{world.rank if storage else 0}"
    emit: Emit = NullEmit()
    if world.leads:
        log = run_dir / "events.jsonl"
        emit = PublishedEventLog(log, storage, RetryPolicy()) if storage else EventLog(log)
    recipe = recipes.build(json.loads(payload["recipe"]))
    more = {"storage": storage, "until_epoch": payload.get("until_epoch")}
    more["shared_file"] = payload.get("shared_file", "")
    return dataclasses.asdict(worker.run(payload_for(recipe, run_dir, **more), world, emit))


def evaluate(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a single model."""
    evaluated = evaluate_models(world, {**_one(payload), "intervals": False})
    if not evaluated:
        return {}
    (one,) = evaluated["models"]
    metrics = {name: estimate["value"] for name, estimate in one["metrics"].items()}
    return {**one, "metrics": metrics}


def evaluate_models(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    """The results in the form of the JSON report."""
    models = tuple(
        ModelFiles(
            one["name"],
            Path(one["model"]),
            one["digest"],
            Path(one["judge"]) if "judge" in one else None,
        )
        for one in payload["models"]
    )
    report = Path(payload["report"]) if "report" in payload else None
    typed = EvaluationPayload(**{**payload, "models": models, "report": report})
    done = job.evaluate_models(typed, world, NullEmit())
    plain = {
        "models": [results.to_plain(one) for one in done.models],
        "comparisons": [results.to_plain(one) for one in done.comparisons],
    }
    return json.loads(json.dumps(plain)) if world.leads else {}


def _one(payload: dict[str, Any]) -> dict[str, Any]:
    own = {name: payload[name] for name in ("model", "digest", "judge") if name in payload}
    rest = {name: value for name, value in payload.items() if name not in own}
    return {**rest, "models": [{"name": "model", **own}]}
