"""The one training loop, for every family.

In: a `TrainingSetup`, a loader, the world, and where events and checkpoints go. Out: a trained
network, checkpoints, events. Everything random is a function of (seed, epoch, step, rank), so a
resumed training continues exactly as if it had never stopped. Must not know Ray, MLflow or where
the shards lie.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.core.errors import unknown
from models.core.family import Batch, BatchRng
from pipelines.data.loading.loaders import TrainStep
from pipelines.interfaces import Emit, GroupStopped, World
from pipelines.recipe import Recipe
from pipelines.training import checkpoints, distributed, optim
from pipelines.training.checkpoint_store import CheckpointFolder
from pipelines.training.checkpoints import Model, Progress, State
from pipelines.training.evaluator import autocast, to_device
from pipelines.training.sample_log import SampleLog
from pipelines.training.setup import TrainingSetup, optim_settings
from pipelines.training.start import Started, begin_with
from pipelines.training.step_errors import explain_memory_error, explain_norm_error
from pipelines.training.train_metrics import NotFiniteError, TrainMetrics


class Loader(Protocol):
    """The training batches of this rank. `samples` is the size of the whole split."""

    samples: int

    def epoch(self, epoch: int, consumed: int = 0) -> Iterator[TrainStep]: ...


Validate = Callable[[nn.Module, int], Mapping[str, float]]
"""Metrics of a network on the validation split after an epoch, counted from 1; the same on every
rank."""


def resolve_precision(precision: str, device: str) -> str:
    """`auto` is bf16 where the hardware multiplies it: such GPUs, and CPUs with AVX512-BF16."""
    if precision != "auto":
        return precision
    if device != "cpu":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def seed_for(*parts: object) -> int:
    """A seed that depends on all of `parts`, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def seed_torch(seed: int, device: str) -> None:
    """Seeds the generators that a network on `device` draws from.

    `torch.manual_seed` seeds those of devices that aren't used as well: each call remembers a stack
    trace for each kind of device, which takes longer than a step of a small network and is never
    freed.
    """
    if device == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class Trainer:
    """One training on one rank. `train()` runs to the end, or to early stopping."""

    def __init__(
        self,
        *,
        setup: TrainingSetup,
        loader: Loader,
        validate: Validate,
        world: World,
        emit: Emit,
        store: CheckpointFolder,
        state: State | None = None,
        start: Model | None = None,
        on_first_batch: Callable[[Batch], None] | None = None,
        sample_log: SampleLog | None = None,
        until_epoch: int | None = None,
    ) -> None:
        """
        Args:
            store: Where checkpoints are saved.
            state: A checkpoint to continue from.
            start: A trained network to begin with.
            on_first_batch: Called on rank 0 with the first transformed batch of the training.
            sample_log: Records the samples of each step.
            until_epoch: Stop after so many epochs. The learning rate still follows a schedule to
                the recipe's last epoch.
        """
        self.setup, self.recipe, self.family = setup, setup.recipe, setup.family
        self.loader, self.validate, self.world, self.emit = loader, validate, world, emit
        self.store, self.on_first_batch, self.sample_log = store, on_first_batch, sample_log
        self.config, self.primary = self.recipe.config(), self.recipe.primary()
        self.precision = resolve_precision(self.recipe.train.precision, world.device)
        self.transform = self.family.augment(self.recipe.augment_settings(), setup.data, train=True)
        self.progress = state.progress if state else Progress()
        epochs = self.recipe.train.epochs
        self.until_epoch = min(until_epoch or epochs, epochs)
        self.total_samples = loader.samples * epochs

        torch.manual_seed(self.recipe.seed)
        self.module = setup.build_module().to(world.device)
        if state:
            self.module.load_state_dict(state.training)
        elif start:
            started = begin_with(start, self.module, setup)
            if world.leads:
                emit({"kind": "notice", "level": "info", "text": _say(setup.recipe, started)})
        else:
            self.family.warm_start(self.config, self.module)
        if self.recipe.train.channels_last:
            self.module.to(memory_format=torch.channels_last)
        self.ema = self._make_ema(state) if self.recipe.train.ema else None
        self.bare_parts = dict(self.family.parts(self.module))
        self.optimizers = {
            part: optim.build(module, optim_settings(setup, part))
            for part, module in self.bare_parts.items()
        }
        if state:
            for part, optimizer in self.optimizers.items():
                checkpoints.unpack_optimizer(optimizer, state.optimizers[part])
        self.parts: dict[str, nn.Module] = {}  # the same, under DDP; set by `_freeze`
        self.frozen: frozenset[str] | None = None
        self.metrics = TrainMetrics()
        self.images_per_second = 0.0

    def train(self) -> Progress:
        """Trains epoch by epoch; each ends with a validation and a checkpoint.

        Raises GroupStopped after the checkpoint at which the driver asked the workers to stop.
        """
        control = self.world.control
        control.begin(self.progress.step)
        while self.should_continue_training():
            self.train_epoch()
            self.validate_epoch()
            self.save_checkpoint()
            if control.stops_after(self.progress.step) and self.should_continue_training():
                self._stop()
        return self.progress

    def _stop(self) -> NoReturn:
        """Ends the work of this group, on all ranks, once its last checkpoint is committed."""
        if self.world.leads:
            self.store.wait()
        distributed.broadcast(None, self.world)
        raise GroupStopped

    def should_continue_training(self) -> bool:
        patience = self.recipe.train.patience
        stopped_early = bool(patience) and self.progress.stale_epochs >= patience
        return self.progress.epoch < self.until_epoch and not stopped_early

    def train_epoch(self) -> None:
        """Trains on the samples of the epoch that aren't consumed yet."""
        progress, recipe = self.progress, self.recipe
        self._freeze(progress.epoch)
        self._set_train_mode()
        self.metrics = TrainMetrics()
        for step in self._timed_steps():
            with explain_memory_error(step, self.world):
                self.train_step(step)
            if self.sample_log:
                samples = step.batch["index"][: step.counted].tolist()
                self.sample_log.write_step(progress.step, epoch=progress.epoch, samples=samples)
            progress.consumed = step.consumed
            progress.seen += step.total
            progress.step += 1
            if progress.step % recipe.train.log_every_steps == 0:
                self.log_metrics()
            every = recipe.checkpoint.every_steps
            stops = self.world.control.stops_after(progress.step)
            is_due = stops or (every and progress.step % every == 0)
            if is_due and step.consumed < self.loader.samples:
                self.log_metrics()
                self.save_checkpoint()
                if stops:
                    self._stop()
        self.log_metrics()

    def train_step(self, step: TrainStep) -> None:
        """Transforms a batch, applies the family's updates, and moves the average on."""
        progress = self.progress
        self._set_learning_rates()
        seed = (self.recipe.seed, progress.epoch, progress.step)
        # Dropout masks are a function of the step, so a resumed training draws the same ones.
        seed_torch(seed_for("step", *seed, self.world.rank), self.world.device)
        rng = BatchRng(seed_for("augment", *seed), step.total, step.rows)
        batch = self.transform(to_device(step.batch, self.world.device), rng)
        if self.recipe.train.channels_last and batch["image"].ndim == 4:
            batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
        if self.on_first_batch and progress.step == 0 and self.world.leads:
            self.on_first_batch(batch)
        self._apply_updates(batch, step)
        if self.ema:
            self.ema.update_parameters(self.module)
        self.metrics.images += step.total
        self.metrics.counted += step.counted

    def log_metrics(self) -> None:
        """Emits the means since the last call. Called by all ranks. Raises NotFiniteError if one is
        not finite, which stops the training."""
        if not self.metrics.images:
            return
        means = self.metrics.reduce(self.world, step=self.progress.step)
        self.metrics = TrainMetrics()
        self.images_per_second = means.images_per_second
        if not self.world.leads:
            return
        self.store.raise_failure()
        rates = {f"train/lr/{p}": o.param_groups[0]["lr"] for p, o in self.optimizers.items()}
        if len(rates) == 1:
            rates = {"train/lr": next(iter(rates.values()))}
        speed = {
            "train/images_per_second": means.images_per_second,
            "train/data_wait_share": means.data_wait_share,
        }
        losses = {f"train/{name}": value for name, value in means.losses.items()}
        self._emit_metrics(self.progress.step, {**losses, **rates, **speed})

    def validate_epoch(self) -> None:
        """Validates, and counts the epoch as trained."""
        progress = self.progress
        self._average_buffers()
        began = time.perf_counter()
        metrics = dict(self.validate(self.eval_module, progress.epoch + 1))
        seconds = time.perf_counter() - began
        progress.epoch += 1
        progress.consumed = 0
        primary = self.primary
        if primary.name not in metrics:
            raise unknown("metric", primary.name, metrics)
        value = metrics[primary.name]
        best = progress.best_value
        improved = best is None or primary.better(value, best)
        progress.stale_epochs = 0 if improved else progress.stale_epochs + 1
        if improved or value == best:  # of two equal epochs the later one: its rate is lower
            progress.best_value, progress.best_step = value, progress.step
            progress.best_epoch = progress.epoch
        if self.world.leads:
            values = {f"val/{name}": v for name, v in metrics.items()}
            self._emit_metrics(progress.epoch, {**values, "val/seconds": seconds})

    def save_checkpoint(self) -> None:
        """Saves a checkpoint; see `CheckpointFolder.save` for when it is committed. Called by all
        ranks."""
        self._average_buffers()
        weights = self.eval_module.state_dict()
        self._check_weights()
        if self.sample_log:
            self.sample_log.publish()
            distributed.broadcast(None, self.world)  # collective: a checkpoint implies these lines
        if self.world.leads:
            self.store.save(
                weights=weights,
                training=self.module.state_dict() if self.ema else None,
                optimizers=self.optimizers,
                recipe=self.recipe,
                card=self.setup.card,
                progress=self.progress,
            )
        distributed.broadcast(None, self.world)  # collective: no rank runs ahead of the save

    @property
    def eval_module(self) -> nn.Module:
        """The network that is validated and saved: the moving average where there is one."""
        return self.ema.module if self.ema else self.module

    def _make_ema(self, state: State | None) -> AveragedModel:
        average = get_ema_multi_avg_fn(self.recipe.train.ema)  # type: ignore[no-untyped-call]
        ema = AveragedModel(self.module, multi_avg_fn=average, use_buffers=True)
        if state:
            ema.module.load_state_dict(state.weights)
            ema.n_averaged.fill_(state.progress.step)
        return ema

    def _freeze(self, epoch: int) -> None:
        """Sets which parameters are trained in this epoch. DDP is made again when that changes,
        because it waits for the gradient of every parameter that required one when it was made."""
        frozen = self.family.frozen(self.config, self.module, epoch)
        if frozen == self.frozen:
            return
        self.frozen = frozen
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.parts = {p: distributed.wrap(m, self.world) for p, m in self.bare_parts.items()}

    def _set_train_mode(self) -> None:
        self.module.train()
        if self.frozen:  # a frozen norm keeps its running statistics too
            for module in self.module.modules():
                own = list(module.parameters(recurse=False))
                if own and not any(p.requires_grad for p in own):
                    module.eval()

    def _timed_steps(self) -> Iterator[TrainStep]:
        """The rest of the epoch's steps. Time spent waiting for one is added to the metrics."""
        steps = iter(self.loader.epoch(self.progress.epoch, self.progress.consumed))
        while True:
            self.world.control.phase("data")
            began = time.perf_counter()
            step = next(steps, None)
            self.metrics.waited_seconds += time.perf_counter() - began
            self.world.control.phase("compute" if step else "")
            if step is None:
                return
            yield step

    def _set_learning_rates(self) -> None:
        factor = optim.factor(self.recipe.schedule, self.progress.seen, self.total_samples)
        for part, optimizer in self.optimizers.items():
            optim.set_rate(optimizer, self.recipe.optim[part].lr * factor)

    def _apply_updates(self, batch: Batch, step: TrainStep) -> None:
        """Applies the family's updates. With gradient accumulation the batch is split into pieces
        whose updates advance together; gradients are synchronised only for the last piece."""
        rows = len(batch["key"])
        pieces = list(_split(batch, min(self.recipe.train.accumulate, rows)))
        updates = [self.family.updates(self.parts, piece) for piece in pieces]
        while True:
            part = ""
            for i, (piece, update) in enumerate(zip(pieces, updates)):
                unsynced = () if i == len(pieces) - 1 else self.parts.values()
                with distributed.no_sync(unsynced):
                    with autocast(self.world.device, self.precision), explain_norm_error(piece):
                        item = next(update, None)
                    if item is None:
                        return
                    part, losses = item
                    counted = len(piece["key"]) if step.counted else 0
                    # DDP averages gradients over ranks. Scaled like this, the result is the
                    # gradient of the mean over the global batch, however it was split.
                    scale = counted * self.world.size / step.total
                    self.world.control.phase("sync")  # DDP waits here for the other ranks
                    (losses["loss"] * scale).backward()  # type: ignore[no-untyped-call]
                    self.world.control.phase("compute")
                if counted:
                    self._record_losses(part, losses, piece)
            if self.recipe.train.clip_norm:
                parameters = self.bare_parts[part].parameters()
                nn.utils.clip_grad_norm_(parameters, self.recipe.train.clip_norm)
            self.optimizers[part].step()
            # An update of one part may leave gradients in the others, as a GAN's generator does.
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)

    def _record_losses(self, part: str, losses: Mapping[str, Tensor], batch: Batch) -> None:
        prefix = "" if len(self.bare_parts) == 1 else f"{part}/"
        self.metrics.add(losses, prefix=prefix, rows=len(batch["key"]))
        self.metrics.remember(losses["loss"], step=self.progress.step, keys=batch["key"])

    def _emit_metrics(self, step: int, values: Mapping[str, float]) -> None:
        progress = self.progress
        self.emit(
            {
                "kind": "metrics",
                "step": step,
                "time_ms": time.time_ns() // 1_000_000,
                "values": dict(values),
                "epoch": progress.epoch,
                "epochs": self.recipe.train.epochs,
                "seen": progress.seen,
                "samples": self.total_samples,
            }
        )

    def _average_buffers(self) -> None:
        """Makes the running statistics of all ranks equal, in the network and in its average."""
        distributed.average_buffers(self.module, self.world)
        if self.ema:
            distributed.average_buffers(self.ema.module, self.world)

    def _check_weights(self) -> None:
        for name, tensor in self.module.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NotFiniteError(
                    f"the weight {name!r} is not finite after step {self.progress.step}",
                    hint="lower optim.model.lr or set train.clip_norm=1; the last checkpoint is "
                    "from before and can be resumed",
                )


def _say(recipe: Recipe, started: Started) -> str:
    known = f"; {len(started.classes)} classes are known" if started.classes else ""
    fresh = f"; new in part: {', '.join(started.fresh)}" if started.fresh else ""
    return f"begins with the weights of {recipe.start_from}{known}{fresh}"


def _split(batch: Batch, pieces: int) -> Iterator[Batch]:
    """Cuts the rows of a batch into pieces of nearly equal size."""
    rows = len(batch["key"])
    edges = [rows * i // pieces for i in range(pieces + 1)]
    for start, end in itertools.pairwise(edges):
        yield {name: value[start:end] for name, value in batch.items()}
