"""What one training worker does, from its payload to a summary.

In: a `TrainingPayload`, the `World`, and where events go. Out: a `TrainingSummary`; checkpoints and
previews in the run's folder. Knows neither Ray nor MLflow: `cluster.workers` calls `run`.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import platform
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from models.core.errors import TesseraError
from models.core.family import Judge
from pipelines import recipe as recipes
from pipelines import tag_names
from pipelines.data.loading import pixel_cache
from pipelines.data.loading.loaders import EvalLoader, TrainLoader
from pipelines.data.loading.source import LoadingOptions
from pipelines.interfaces import Emit, World
from pipelines.recipe import Recipe
from pipelines.storage.base import use_cache_of
from pipelines.tracking.published_log import EmitFiles
from pipelines.training import checkpoints, distributed, hardware
from pipelines.training.checkpoint_store import CheckpointFolder, PublishedCheckpoints
from pipelines.training.checkpoints import Model, Progress, State
from pipelines.training.evaluator import (
    Evaluator,
    Predictions,
    build_evaluator,
    predict_split,
)
from pipelines.training.judge import open_judge
from pipelines.training.payload import TrainingPayload, TrainingSummary
from pipelines.training.previews import PreviewLogger
from pipelines.training.run import CHECKPOINTS, JUDGE, START
from pipelines.training.run_storage import RunStorage, scratch_folder
from pipelines.training.sample_log import SampleLog
from pipelines.training.setup import TrainingSetup
from pipelines.training.shared_cache import share_pixels
from pipelines.training.trainer import Trainer, resolve_precision


def run(payload: TrainingPayload, world: World, emit: Emit) -> TrainingSummary:
    """Trains to the end, or to `payload.until_epoch`, from the newest intact checkpoint if there is
    one. Called by all ranks; only rank 0's summary has metrics. Raises TesseraError, which is not
    retried, also if a disk is full."""
    try:
        return _train(payload, world, emit)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TesseraError(
            f"{error.filename or payload.run_dir} can't be written: {error.strerror}",
            hint="the last checkpoint is intact; free some space and use --resume",
        ) from error


def _train(payload: TrainingPayload, world: World, emit: Emit) -> TrainingSummary:
    use_cache_of(payload.cache)
    emit({"kind": "worker", "rank": world.rank, "pid": os.getpid(), "device": world.device})
    setup = TrainingSetup.of(payload.recipe, payload.card)
    files = _Files.of(payload, emit)
    emit = files.emit
    state = _resume(files.checkpoints, setup.recipe, world, emit, payload.changing)
    previews = PreviewLogger(setup, files.run_dir, emit)
    validation = _Validation(setup, world, files.run_dir)

    def validate(module: nn.Module, epoch: int) -> Mapping[str, float]:
        predictions = validation.predict(module)
        metrics = None
        if predictions:
            metrics = validation.metrics(predictions)
            previews.epoch(epoch, validation.evaluator(module), predictions)
        agreed: dict[str, float] = distributed.broadcast(metrics, world)
        return agreed

    loader = train_loader(setup, world)
    if world.leads:
        _report_environment(loader, emit)
        _report_few_steps(setup, loader, emit)
    trainer = Trainer(
        setup=setup,
        loader=loader,
        validate=validate,
        world=world,
        emit=emit,
        store=files.checkpoints,
        state=state,
        start=None if state else _start(setup.recipe, files.run_dir),
        on_first_batch=previews.training_samples,
        sample_log=_open_sample_log(setup.recipe, files, world, state),
        until_epoch=payload.until_epoch,
    )
    progress = trainer.train()
    if world.leads:
        files.checkpoints.wait()
    distributed.broadcast(None, world)  # collective: the last checkpoint is committed
    summary = _summary(trainer, progress)
    if not summary.ended:
        return summary
    module = setup.build_module().to(world.device)
    module.load_state_dict(files.checkpoints.load(summary.checkpoint).weights)
    predictions = validation.predict(module)
    if predictions is not None:
        previews.outcome(validation.evaluator(module), predictions)
        emit.flush()
        summary = dataclasses.replace(summary, metrics=validation.metrics(predictions))
    distributed.broadcast(None, world)  # collective: no rank reads its files any more
    files.remove_copies(payload)
    return summary


@dataclasses.dataclass(frozen=True)
class _Files:
    """Where this worker's files are: the folder of the run, or this machine's copy of it."""

    run_dir: Path
    emit: Emit
    checkpoints: CheckpointFolder
    storage: RunStorage | None = None

    @classmethod
    def of(cls, payload: TrainingPayload, emit: Emit) -> _Files:
        keep = payload.recipe.checkpoint.keep
        if not payload.storage:
            _check_shared(payload)
            folder = payload.run_dir / CHECKPOINTS
            return cls(payload.run_dir, emit, CheckpointFolder(folder, emit, keep=keep))
        run_dir = scratch_folder(payload.run_dir)
        storage = RunStorage.open(payload.storage, has_responded=True, attempt=payload.attempt)
        used = {JUDGE: payload.recipe.judge, START: payload.recipe.start_from}
        for name, version in used.items():
            if version:
                storage.fetch_folder(name, run_dir / name)
        emit = EmitFiles(emit, run_dir)
        store = PublishedCheckpoints(run_dir / CHECKPOINTS, emit, storage, keep=keep)
        return cls(run_dir, emit, store, storage)

    def remove_copies(self, payload: TrainingPayload) -> None:
        """Removes this machine's copies when a training has ended, but never the driver's own
        folder: it has a file that is no copy, and several machines may share it."""
        if self.storage is not None and not (self.run_dir / payload.shared_file).exists():
            shutil.rmtree(self.run_dir, ignore_errors=True)


def _check_shared(payload: TrainingPayload) -> None:
    """Raises TesseraError if this machine doesn't see the run's folder: one that joined the cluster
    after `cluster.shared_folder` asked all of them."""
    if payload.shared_file and not (payload.run_dir / payload.shared_file).exists():
        raise TesseraError(
            f"the machine {socket.gethostname()} doesn't see {payload.run_dir}, so what is trained "
            "would be lost",
            hint="keep runs in an object store: --storage s3://BUCKET/FOLDER, or TESSERA_STORAGE",
        )


class _Validation:
    """The validation split of a training, for any state of its network."""

    def __init__(self, setup: TrainingSetup, world: World, run_dir: Path) -> None:
        self._setup, self._world = setup, world
        self._precision = resolve_precision(setup.recipe.train.precision, world.device)
        self._judge: Judge | None = None
        if setup.family.task.needs_judge:
            digest = setup.recipe.judge_digest
            self._judge = open_judge(run_dir / JUDGE, digest, setup.data, world.device)
        self._loader = EvalLoader(
            setup.recipe.data.path,
            setup.card,
            setup.data,
            batch_size=setup.family.task.eval_batch,
            world=world,
            split="val",
            **_reading_options(setup.recipe),
        )

    def evaluator(self, module: nn.Module) -> Evaluator:
        return build_evaluator(
            self._setup.recipe,
            self._setup.data,
            module,
            self._world.device,
            precision=self._precision,
            judge=self._judge,
        )

    def predict(self, module: nn.Module) -> Predictions | None:
        """Predictions of the whole split on rank 0, None elsewhere. Called by all ranks."""
        evaluator = self.evaluator(module)
        setup = self._setup
        return predict_split(setup.family, evaluator, setup.data, self._loader, self._world)

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """The task's metrics, and those that the recipe names."""
        setup = self._setup
        return predictions.metrics(setup.family, setup.data, setup.recipe.metrics)


def _report_environment(loader: TrainLoader, emit: Emit) -> None:
    tags = {
        tag_names.CACHE: loader.cache_choice,
        tag_names.HARDWARE: hardware.describe(),
        tag_names.PYTHON: platform.python_version(),
    }
    emit({"kind": "tags", "values": tags})
    emit({"kind": "notice", "level": "info", "text": f"cache: {loader.cache_choice}"})


FEW_STEPS = 3
"""A training reports that it has fewer steps than these in an epoch."""


def _report_few_steps(setup: TrainingSetup, loader: TrainLoader, emit: Emit) -> None:
    """Reports a batch that is so large that an epoch has one or two steps: the usual number of
    epochs then trains hardly at all."""
    steps = loader.steps_per_epoch
    if steps < FEW_STEPS and loader.samples > steps:
        text = (
            f"{loader.samples:,} training images in batches of {setup.recipe.train.batch_size:,} "
            f"are {steps} steps an epoch: a smaller train.batch_size makes more"
        )
        emit({"kind": "notice", "level": "info", "text": text})


def _summary(trainer: Trainer, progress: Progress) -> TrainingSummary:
    assert progress.best_step is not None
    assert progress.best_epoch is not None  # both are set after the first epoch
    return TrainingSummary(
        checkpoint=checkpoints.name_of(progress.best_step),
        newest=checkpoints.name_of(progress.step),
        step=progress.best_step,
        epoch=progress.best_epoch,
        epochs=progress.epoch,
        images_per_second=trainer.images_per_second,
        precision=trainer.precision,
        ended=trainer.until_epoch == trainer.recipe.train.epochs,
    )


def _open_sample_log(
    recipe: Recipe, files: _Files, world: World, state: State | None
) -> SampleLog | None:
    if not recipe.data.sample_log:
        return None
    step = state.progress.step if state else 0
    storage = files.storage.storage if files.storage else None
    return SampleLog(files.run_dir, world, step=step, storage=storage)


def train_loader(setup: TrainingSetup, world: World) -> TrainLoader:
    """The training batches of this rank, as the recipe wants them."""
    recipe, card, data = setup.recipe, setup.card, setup.data
    samples = card.split("train").samples
    options = _reading_options(recipe)
    crop = setup.family.task.crop(recipe.augment_settings())
    if crop is not None:
        options["cache"] = "none"
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
        crop=crop,
        sampler=recipe.data.sampler,
        **options,
    )


def _reading_options(recipe: Recipe) -> LoadingOptions:
    """How the recipe wants a split to be read."""
    return {
        "fit": recipe.data.fit,
        "cache": recipe.data.cache,
        "cache_bytes": int(recipe.data.cache_gib * (1 << 30)),
        "loader_workers": recipe.data.loader_workers,
    }


def _start(recipe: Recipe, run_dir: Path) -> Model | None:
    """The version that the training begins with, if the recipe names one."""
    if not recipe.start_from:
        return None
    return checkpoints.read_model(run_dir / START, recipe.start_from_digest)


def _resume(
    store: CheckpointFolder, recipe: Recipe, world: World, emit: Emit, changing: Sequence[str]
) -> State | None:
    """The newest intact checkpoint, chosen by rank 0 and read by every rank; None without one.
    Raises UsageError if it was made with other settings."""
    name = None
    if world.leads:
        state = store.newest()
        name = state.path.name if state else None
        if state:
            emit({"kind": "resume", "checkpoint": name, **dataclasses.asdict(state.progress)})
        elif store.damaged:
            emit({"kind": "start", "reason": f"damaged: {', '.join(sorted(store.damaged))}"})
        else:
            emit({"kind": "start", "reason": f"there is no checkpoint in {store.where}"})
    name = distributed.broadcast(name, world)
    if name is None:
        return None
    state = store.load(name)
    recipes.check_resumable(state.recipe, recipe, changing)
    return state
