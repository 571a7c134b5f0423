"""What the ranks of the tests do; see `gloo_ranks.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.evaluation import job
from pipelines.interfaces import World
from pipelines.tracking.events import EventLog, read_events
from pipelines.training import worker


class Nothing:
    def __call__(self, event: Mapping[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass


def train(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    """Trains; gives the losses by step and what the worker said."""
    spool = Path(payload["run_dir"]) / "events.jsonl"
    emit = EventLog(spool) if world.leads else Nothing()
    summary = worker.run(payload, world, emit)
    losses = [
        event["values"]["train/loss"]
        for event, _ in read_events(spool)
        if "train/loss" in event.get("values", {})
    ]
    return {"losses": losses, **summary}


def evaluate(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    """The figures of one model alone."""
    found = examine(world, {**_one(payload), "intervals": False})
    if not found:
        return {}
    (one,) = found["models"]
    metrics = {name: estimate["value"] for name, estimate in one["metrics"].items()}
    return {**one, "metrics": metrics}


def examine(world: World, payload: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(job.evaluate_models(payload, world, Nothing())))


def _one(payload: dict[str, Any]) -> dict[str, Any]:
    own = {name: payload[name] for name in ("model", "digest", "judge") if name in payload}
    rest = {name: value for name, value in payload.items() if name not in own}
    return {**rest, "models": [{"name": "model", **own}]}
