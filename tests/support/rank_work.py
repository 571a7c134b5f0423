"""What the ranks of the tests do; see `gloo_ranks.py`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pipelines import recipe as recipes
from pipelines.evaluation import job
from pipelines.interfaces import NullEmit, World
from pipelines.recipe import Recipe
from pipelines.tracking.events import EventLog, read_events
from pipelines.training import worker
from pipelines.training.payload import TrainingPayload
from pipelines.training.setup import open_setup


def payload_for(recipe: Recipe, run_dir: Path, **more: Any) -> TrainingPayload:
    """What a driver would send to the workers."""
    setup = open_setup(recipe)
    return TrainingPayload(setup.recipe, setup.card, run_dir, **more)


def train(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    """Trains; returns the losses by step and the worker's summary."""
    run_dir = Path(payload["run_dir"])
    spool = run_dir / "events.jsonl"
    emit = EventLog(spool) if world.leads else NullEmit()
    recipe = recipes.build(json.loads(payload["recipe"]))
    summary = worker.run(payload_for(recipe, run_dir), world, emit)
    losses = [
        event["values"]["train/loss"]
        for event, _ in read_events(spool)
        if "train/loss" in event.get("values", {})
    ]
    return {"losses": losses, **dataclasses.asdict(summary)}


def evaluate(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    """The figures of one model alone."""
    found = examine(world, {**_one(payload), "intervals": False})
    if not found:
        return {}
    (one,) = found["models"]
    metrics = {name: estimate["value"] for name, estimate in one["metrics"].items()}
    return {**one, "metrics": metrics}


def examine(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(job.evaluate_models(payload, world, NullEmit())))


def _one(payload: dict[str, Any]) -> dict[str, Any]:
    own = {name: payload[name] for name in ("model", "digest", "judge") if name in payload}
    rest = {name: value for name, value in payload.items() if name not in own}
    return {**rest, "models": [{"name": "model", **own}]}
