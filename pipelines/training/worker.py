"""What one worker does: the only place where the core and the rooms' data meet.

In: a payload of plain JSON, the world, and where events go. Out: a summary of plain JSON. Knows
neither Ray nor MLflow; `cluster` is handed these functions by a job.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import models
from models.core.family import DataSpec
from pipelines import recipe as recipes
from pipelines import tag_names
from pipelines.data.card import Card
from pipelines.data.loading import pixel_cache
from pipelines.data.loading.loaders import EvalLoader, TrainLoader
from pipelines.data.loading.source import LoadingOptions
from pipelines.interfaces import Emit, World
from pipelines.recipe import Recipe
from pipelines.storage.base import use_cache_of
from pipelines.training import checkpoints, distributed, evaluator, hardware, inputs
from pipelines.training.checkpoints import State
from pipelines.training.inputs import JUDGE
from pipelines.training.previews import PreviewLogger
from pipelines.training.sample_log import SampleLog
from pipelines.training.shared_cache import share_pixels
from pipelines.training.trainer import Training, resolve_precision

CHECKPOINTS = "checkpoints"


def run(payload: dict[str, Any], world: World, emit: Emit) -> dict[str, Any]:
    """Trains to the end, from the newest good checkpoint if there is one.

    payload: `recipe` (JSON text), `run_dir`, `cache` for remote shards; `until_epoch` where it is
    to stop before its end, and `changing`, the settings that it may change on its way. Gives the
    best checkpoint's name, step and epoch, the newest one's name, the epochs trained, images/s,
    precision, whether it `ended`, and then the best one's validation figures.
    """
    use_cache_of(payload.get("cache", {}))
    emit({"kind": "worker", "rank": world.rank, "pid": os.getpid(), "device": world.device})
    recipe = recipes.build(json.loads(payload["recipe"]))
    run_dir = Path(payload["run_dir"])
    card, data = inputs.open_data(recipe)
    family = models.get(recipe.family)
    state = _resume(run_dir / CHECKPOINTS, recipe, world, emit, payload.get("changing", ()))
    precision = resolve_precision(recipe.train.precision, world.device)
    make_evaluator = evaluator.make_evaluator(
        recipe, data, world, precision, judge_folder=run_dir / JUDGE
    )
    validation = EvalLoader(
        recipe.data.path,
        card,
        data,
        batch_size=family.task.eval_batch,
        world=world,
        split="val",
        **_reading(recipe),
    )
    show = PreviewLogger(family, recipe, card, data, run_dir, emit)

    def validate(module: nn.Module, epoch: int) -> Mapping[str, float]:
        ask = make_evaluator(module)
        answers = evaluator.answer(family, ask, data, validation, world)
        metrics = answers.metrics(family, data, recipe.metrics) if answers else None
        if answers:
            show.epoch(epoch, ask, answers)
        agreed: dict[str, float] = distributed.broadcast(metrics, world)
        return agreed

    loader = _train_loader(recipe, card, data, world)
    if world.leads:
        told = {
            tag_names.CACHE: loader.cache_choice,
            tag_names.HARDWARE: hardware.describe(),
            tag_names.PYTHON: platform.python_version(),
        }
        emit({"kind": "tags", "values": told})
        emit({"kind": "notice", "level": "info", "text": f"cache: {loader.cache_choice}"})
    training = Training(
        family=family,
        recipe=recipe,
        card=card,
        data=data,
        loader=loader,
        validate=validate,
        world=world,
        emit=emit,
        folder=run_dir / CHECKPOINTS,
        state=state,
        on_first_batch=show.training_samples,
        sample_log=_open_ledger(recipe, run_dir, world, state),
        until_epoch=payload.get("until_epoch"),
    )
    progress = training.run()
    best = f"step-{progress.best_step:09d}"
    summary: dict[str, Any] = {
        "checkpoint": best,
        "newest": f"step-{progress.step:09d}",
        "step": progress.best_step,
        "epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "metrics": {},
        "images_per_second": training.images_per_second,
        "precision": precision,
        "ended": training.until_epoch == recipe.train.epochs,
    }
    if not summary["ended"]:
        return summary
    module = family.build(recipe.config(), data).to(world.device)
    module.load_state_dict(checkpoints.load(run_dir / CHECKPOINTS / best).weights)
    ask = make_evaluator(module)
    answers = evaluator.answer(family, ask, data, validation, world)
    if answers is not None:
        show.outcome(ask, answers)
        emit.flush()
    return {**summary, "metrics": answers.metrics(family, data, recipe.metrics) if answers else {}}


def _open_ledger(
    recipe: Recipe, run_dir: Path, world: World, state: State | None
) -> SampleLog | None:
    step = state.progress.step if state else 0
    return SampleLog(run_dir, world, step=step) if recipe.data.sample_log else None


def _train_loader(recipe: Recipe, card: Card, data: DataSpec, world: World) -> TrainLoader:
    samples = card.split("train").samples
    options = _reading(recipe)
    choice = pixel_cache.choose(
        samples, data, cache=options["cache"], cache_bytes=options["cache_bytes"]
    )
    if choice.kind != "none":
        options["share"] = share_pixels(samples, data, world)
    return TrainLoader(
        recipe.data.path,
        card,
        data,
        batch_size=recipe.train.batch_size,
        seed=recipe.seed,
        world=world,
        **options,
    )


def _reading(recipe: Recipe) -> LoadingOptions:
    """How the recipe wants a split to be read."""
    return {
        "fit": recipe.data.fit,
        "cache": recipe.data.cache,
        "cache_bytes": int(recipe.data.cache_gib * (1 << 30)),
        "loader_workers": recipe.data.loader_workers,
    }


def _resume(
    folder: Path, recipe: Recipe, world: World, emit: Emit, changing: Sequence[str]
) -> State | None:
    chosen = None
    if world.leads:
        folder.mkdir(parents=True, exist_ok=True)
        state, notices = checkpoints.newest(folder)
        for line in notices:
            emit({"kind": "notice", "text": line})
        chosen = state.path.name if state else None
        if state:
            emit({"kind": "resume", "checkpoint": chosen, **dataclasses.asdict(state.progress)})
    chosen = distributed.broadcast(chosen, world)
    if chosen is None:
        return None
    state = checkpoints.load(folder / chosen)
    recipes.check_resumable(state.recipe, recipe, changing)
    return state
