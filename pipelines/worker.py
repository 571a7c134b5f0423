"""What one worker does: the only place where the core and the rooms' data meet.

In: a payload of plain JSON, the world, and where events go. Out: a summary of plain JSON. Knows
neither Ray nor MLflow; `cluster` is handed these functions by a job.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec, Family
from pipelines import checkpoints, distributed, evaluation, hardware, judging
from pipelines import recipe as recipes
from pipelines.checkpoints import State
from pipelines.data import card as cards
from pipelines.data.batching import decoded
from pipelines.data.batching.supply import Options
from pipelines.data.card import Card
from pipelines.data.loading import EvalLoader, TrainLoader
from pipelines.data.places import storage
from pipelines.evaluation import Asker
from pipelines.ledger import Ledger
from pipelines.ports import Emit, World
from pipelines.recipe import Recipe
from pipelines.sharing import share_pixels
from pipelines.showing import Show
from pipelines.training import Training, resolve_precision

CHECKPOINTS = "checkpoints"
JUDGE = "judge"
"""The folder of a run, or of a payload, with the files of the classifier that judges."""


def run(payload: dict[str, Any], world: World, emit: Emit) -> dict[str, Any]:
    """Trains to the end, from the newest good checkpoint if there is one.

    payload: `recipe` (JSON text), `run_dir`, `cache` for remote shards; `until_epoch` where it is
    to stop before its end, and `changing`, the settings that it may change on its way. Gives the
    best checkpoint's name, step and epoch, the newest one's name, the epochs trained, images/s,
    precision, whether it `ended`, and then the best one's validation figures.
    """
    storage.use_cache_of(payload.get("cache", {}))
    emit({"kind": "worker", "rank": world.rank, "pid": os.getpid(), "device": world.device})
    recipe = recipes.build(json.loads(payload["recipe"]))
    run_dir = Path(payload["run_dir"])
    card, data = open_data(recipe)
    family = models.get(recipe.family)
    state = _resume(run_dir / CHECKPOINTS, recipe, world, emit, payload.get("changing", ()))
    precision = resolve_precision(recipe.train.precision, world.device)
    asker = _asker(recipe, data, world, precision, run_dir / JUDGE)
    validation = EvalLoader(
        recipe.data.path,
        card,
        data,
        batch_size=family.task.eval_batch,
        world=world,
        split="val",
        **_reading(recipe),
    )
    show = Show(family, recipe, card, data, run_dir, emit)

    def validate(module: nn.Module, epoch: int) -> Mapping[str, float]:
        ask = asker(module)
        answers = evaluation.answer(family, ask, data, validation, world)
        figures = answers.figures(family, data) if answers else None
        if answers:
            show.epoch(epoch, ask, answers)
        agreed: dict[str, float] = distributed.broadcast(figures, world)
        return agreed

    loader = _train_loader(recipe, card, data, world)
    if world.leads:
        told = {
            "tessera.cache": loader.cache_choice,
            "tessera.hardware": hardware.describe(),
            "tessera.python": platform.python_version(),
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
        ledger=_open_ledger(recipe, run_dir, world, state),
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
        "figures": {},
        "images_per_second": training.images_per_second,
        "precision": precision,
        "ended": training.until_epoch == recipe.train.epochs,
    }
    if not summary["ended"]:
        return summary
    module = family.build(recipe.config(), data).to(world.device)
    module.load_state_dict(checkpoints.load(run_dir / CHECKPOINTS / best).weights)
    ask = asker(module)
    answers = evaluation.answer(family, ask, data, validation, world)
    if answers is not None:
        show.outcome(ask, answers)
        emit.flush()
    return {**summary, "figures": answers.figures(family, data) if answers else {}}


def _open_ledger(recipe: Recipe, run_dir: Path, world: World, state: State | None) -> Ledger | None:
    step = state.progress.step if state else 0
    return Ledger(run_dir, world, step=step) if recipe.data.ledger else None


def _train_loader(recipe: Recipe, card: Card, data: DataSpec, world: World) -> TrainLoader:
    samples = card.split("train").samples
    options = _reading(recipe)
    choice = decoded.choose(
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


def _reading(recipe: Recipe) -> Options:
    """How the recipe wants a split to be read."""
    return {
        "fit": recipe.data.fit,
        "cache": recipe.data.cache,
        "cache_bytes": int(recipe.data.cache_gib * (1 << 30)),
        "loader_workers": recipe.data.loader_workers,
    }


def _asker(
    recipe: Recipe,
    data: DataSpec,
    world: World,
    precision: str,
    judge_folder: Path,
) -> Callable[[nn.Module], Asker]:
    """Makes a network one that can be asked."""
    judge = None
    if models.get(recipe.family).task.judged:
        judge = judging.open_judge(judge_folder, recipe.judge_digest, data, world.device)

    def ask(module: nn.Module) -> Asker:
        return Asker(
            models.get(recipe.family),
            module,
            data,
            world.device,
            augment_settings=recipe.augment_settings(),
            precision=precision,
            channels_last=recipe.train.channels_last,
            judge=judge,
        )

    return ask


def evaluate(payload: dict[str, Any], world: World, emit: Emit) -> dict[str, Any]:
    """Evaluates a model directory on one split, every sample once, in fp32.

    payload: `model` (folder), `digest`, `data`, `split`, `cache` for remote shards, `judge` where the
    task is judged (a folder). Gives `figures`, `samples`, `data_digest`.
    """
    storage.use_cache_of(payload.get("cache", {}))
    model = checkpoints.read_model(Path(payload["model"]), payload["digest"])
    place, split = payload["data"], payload["split"]
    card = cards.read(place)
    family = models.get(model.recipe.family)
    check_readable(family, card)
    if family.task.knows_classes and card.classes != model.card.classes:
        raise TesseraError(
            f"the model knows the classes {_some(model.card.classes)}, "
            f"the data set has {_some(card.classes)}",
            mend="evaluate it on data with the same classes in the same order",
        )
    data = seen_of(model.recipe, model.card)
    if (
        model.recipe.data.fit == "pad" and family.any_size
    ):  # its own size for every image, and a frame for the largest
        frame = card.spec(model.recipe.data.height, model.recipe.data.width)
        data = dataclasses.replace(data, height=frame.height, width=frame.width)
    module = family.build(model.recipe.config(), data)
    module.load_state_dict(model.weights)
    module.to(world.device)
    ask = _asker(model.recipe, data, world, "fp32", Path(payload.get("judge", "")))(module)
    loader = EvalLoader(
        place,
        card,
        data,
        batch_size=family.task.eval_batch,
        world=world,
        split=split,
        fit=model.recipe.data.fit,
        cache="none",
    )
    answers = evaluation.answer(family, ask, data, loader, world)
    if answers is None:
        return {}
    return {
        "figures": answers.figures(family, data),
        "samples": len(answers.records),
        "data_digest": card.digest,
        "split": split,
    }


def open_data(recipe: Recipe) -> tuple[Card, DataSpec]:
    """The recipe's data set; refused when it isn't the one that the recipe was made for."""
    card = cards.read(recipe.data.path)
    if recipe.data.digest and recipe.data.digest != card.digest:
        raise TesseraError(
            f"the data set in {recipe.data.path} is another than the recipe names: "
            f"digest {card.digest[:12]}…, recipe {recipe.data.digest[:12]}…",
            mend="give the data set it was made for, or --set data.digest= for a new training",
        )
    family = models.get(recipe.family)
    check_readable(family, card)
    if family.task.judged and not recipe.judge:
        raise UsageError(
            f"what a {recipe.family} makes is judged by a classifier of the same data, and none is "
            "named",
            mend="train one, then: --set judge=models:/NAME@ALIAS",
        )
    return card, seen_of(recipe, card)


def seen_of(recipe: Recipe, card: Card) -> DataSpec:
    """What the recipe's network sees of a data set."""
    task = models.get(recipe.family).task
    return card.spec(recipe.data.height, recipe.data.width, reads=task.reads)


def check_readable(family: Family[Any], card: Card) -> None:
    """Refuses data of which the family can't read what it asks for."""
    task = family.task
    if card.can_be_read_as(task.reads):
        return
    fitting = [n for n in models.names() if card.can_be_read_as(models.get(n).task.reads)]
    kind = card.task.replace("_", " ")
    raise TesseraError(
        f"{family.name} does {task.name.replace('_', ' ')}, but the data set is one of {kind}",
        mend=f"these train on it: {', '.join(fitting)}",
    )


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


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")
