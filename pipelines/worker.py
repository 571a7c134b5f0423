"""What one worker does: the only place where the core and the rooms' data meet.

In: a payload of plain JSON, the world, and where events go. Out: a summary of plain JSON. Knows
neither Ray nor MLflow; `cluster` is handed these functions by a job.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

import models
from models.core.errors import TesseraError
from models.core.family import Batch, DataSpec
from pipelines import checkpoints, distributed, evaluation, pictures
from pipelines import recipe as recipes
from pipelines.checkpoints import State
from pipelines.data import card as cards
from pipelines.data.batching import decoded
from pipelines.data.batching.supply import Options
from pipelines.data.card import Card
from pipelines.data.loading import EvalLoader, TrainLoader
from pipelines.data.places import storage
from pipelines.data.samples import decode_image, fit_image
from pipelines.data.shards import ShardReader
from pipelines.evaluation import Answers
from pipelines.ledger import Ledger
from pipelines.ports import Emit, World
from pipelines.recipe import Recipe
from pipelines.sharing import share_pixels
from pipelines.training import Training, resolve_precision

EVAL_BATCH = 256
"""Fixed: figures must not depend on the hardware or the number of workers."""
CHECKPOINTS = "checkpoints"
PICTURES = "pictures"


def run(payload: dict[str, Any], world: World, emit: Emit) -> dict[str, Any]:
    """Trains to the end, from the newest good checkpoint if there is one.

    payload: `recipe` (JSON text), `run_dir`, `cache` for remote shards. Gives the best checkpoint's name, step, epoch and
    value, its validation figures, images/s and notices.
    """
    storage.use_cache_of(payload.get("cache", {}))
    emit({"kind": "worker", "rank": world.rank, "pid": os.getpid(), "device": world.device})
    recipe = recipes.build(json.loads(payload["recipe"]))
    run_dir = Path(payload["run_dir"])
    card, data = open_data(recipe)
    family = models.get(recipe.family)
    state = _resume(run_dir / CHECKPOINTS, recipe, world, emit)
    precision = resolve_precision(recipe.train.precision, world.device)
    answer = _answerer(recipe, card, data, world, precision)

    def validate(module: nn.Module) -> Mapping[str, float]:
        answers = answer(module)
        figures = answers.figures(family, data) if answers else None
        agreed: dict[str, float] = distributed.broadcast(figures, world)
        return agreed

    def show_first(batch: Batch) -> None:
        _draw_training_grid(family, data, batch, run_dir, emit)

    loader = _train_loader(recipe, card, data, world)
    if world.leads:
        emit({"kind": "tags", "values": {"tessera.cache": loader.cache_choice}})
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
        on_first_batch=show_first,
        ledger=_open_ledger(recipe, run_dir, world, state),
    )
    progress = training.run()
    best = f"step-{progress.best_step:09d}"
    module = family.build(recipe.config(), data).to(world.device)
    module.load_state_dict(checkpoints.load(run_dir / CHECKPOINTS / best).weights)
    answers = answer(module)
    if answers is not None:
        _draw_answers(family, recipe, card, data, answers, run_dir, emit)
        emit.flush()
    return {
        "checkpoint": best,
        "step": progress.best_step,
        "epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "figures": answers.figures(family, data) if answers else {},
        "images_per_second": training.images_per_second,
        "precision": precision,
    }


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


def _answerer(
    recipe: Recipe, card: Card, data: DataSpec, world: World, precision: str
) -> Callable[[nn.Module], Answers | None]:
    """A network's answers on the validation split, on rank 0."""
    loader = EvalLoader(
        recipe.data.path,
        card,
        data,
        batch_size=EVAL_BATCH,
        world=world,
        split="val",
        **_reading(recipe),
    )

    def answer(module: nn.Module) -> Answers | None:
        return evaluation.answer(
            models.get(recipe.family),
            module,
            data,
            loader,
            world,
            augment_settings=recipe.augment_settings(),
            precision=precision,
            channels_last=recipe.train.channels_last,
        )

    return answer


def evaluate(payload: dict[str, Any], world: World, emit: Emit) -> dict[str, Any]:
    """Evaluates a model directory on one split, every sample once, in fp32.

    payload: `model` (folder), `digest`, `data`, `split`, `cache` for remote shards. Gives `figures`,
    `samples`, `data_digest`.
    """
    storage.use_cache_of(payload.get("cache", {}))
    model = checkpoints.read_model(Path(payload["model"]), payload["digest"])
    place, split = payload["data"], payload["split"]
    card = cards.read(place)
    if card.classes != model.card.classes:
        raise TesseraError(
            f"the model knows the classes {_some(model.card.classes)}, "
            f"the data set has {_some(card.classes)}",
            mend="evaluate it on data with the same classes in the same order",
        )
    family = models.get(model.recipe.family)
    # The network sees these images as it saw those it was trained on: same size, same scaling.
    data = model.card.spec(model.recipe.data.height, model.recipe.data.width)
    module = family.build(model.recipe.config(), data)
    module.load_state_dict(model.weights)
    module.to(world.device)
    answers = evaluation.answer(
        family,
        module,
        data,
        EvalLoader(
            place,
            card,
            data,
            batch_size=EVAL_BATCH,
            world=world,
            split=split,
            fit=model.recipe.data.fit,
            cache="none",
        ),
        world,
        augment_settings=model.recipe.augment_settings(),
    )
    if answers is None:
        return {}
    return {
        "figures": answers.figures(family, data),
        "samples": len(answers.predictions),
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
    task = models.get(recipe.family).task.name
    if card.task != task:
        fitting = [name for name in models.names() if models.get(name).task.name == card.task]
        kind = card.task.replace("_", " ")
        raise TesseraError(
            f"{recipe.family} does {task}, but the data set is one of {kind}",
            mend=f"these train on it: {', '.join(fitting)}"
            if fitting
            else "no family does that yet",
        )
    return card, card.spec(recipe.data.height, recipe.data.width)


def _resume(folder: Path, recipe: Recipe, world: World, emit: Emit) -> State | None:
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
    recipes.check_resumable(state.recipe, recipe)
    return state


def _draw_training_grid(
    family: Any, data: DataSpec, batch: Batch, run_dir: Path, emit: Emit
) -> None:
    shown = min(32, len(batch["key"]))
    targets = family.task.targets({k: v[:shown] for k, v in batch.items()})
    path = run_dir / PICTURES / "training_samples.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    images = batch["image"][:shown].detach().float().cpu()
    mean = images.new_tensor(data.mean).view(1, -1, 1, 1)
    std = images.new_tensor(data.std).view(1, -1, 1, 1)
    captions = [family.task.caption(None, target, data) for target in targets]
    pictures.grid((images * std + mean).clamp(0, 1), captions, path)
    emit({"kind": "artifact", "path": f"{PICTURES}/{path.name}", "folder": PICTURES})


def _draw_answers(
    family: Any,
    recipe: Recipe,
    card: Card,
    data: DataSpec,
    answers: Answers,
    run_dir: Path,
    emit: Emit,
) -> None:
    import torch

    folder = run_dir / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    names = ["worst_mistakes.png"]
    worst = answers.worst(family, 24)
    reader = ShardReader(recipe.data.path, card, "val")
    images, captions = [], []
    for position in worst:
        stored = reader.read(answers.indices[position])
        image = decode_image(stored.image, data.channels, where=stored.key)
        images.append(fit_image(image, data.height, data.width, recipe.data.fit))
        prediction, target = answers.predictions[position], answers.targets[position]
        captions.append(family.task.caption(prediction, target, data))
    pictures.grid(torch.stack(images), captions, folder / names[0])
    matrix = family.task.confusion(answers.predictions, answers.targets, data)
    if matrix is not None:
        pictures.confusion_matrix(matrix, data.classes, folder / "confusion_matrix.png")
        names.append("confusion_matrix.png")
    for name in names:
        emit({"kind": "artifact", "path": f"{PICTURES}/{name}", "folder": PICTURES})


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")
