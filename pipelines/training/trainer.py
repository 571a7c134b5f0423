"""The one training loop, for every family.

In: a family and its network, a recipe, loaders, the world, and where events and checkpoints go.
Out: a trained network, checkpoints, events. Everything random is a function of (seed, epoch, step,
rank), so a training that is resumed goes on exactly as if it had never stopped. Must not know Ray,
MLflow or where the shards lie.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.core.errors import TesseraError
from models.core.family import Batch, BatchRng, DataSpec, Family
from pipelines.data.card import Card
from pipelines.data.loading.loaders import TrainStep
from pipelines.interfaces import Emit, World
from pipelines.recipe import Recipe
from pipelines.training import checkpoints, distributed, optim
from pipelines.training.checkpoints import Progress, State
from pipelines.training.evaluator import autocast, to_device
from pipelines.training.sample_log import SampleLog


class NotFiniteError(TesseraError):
    """The loss or a weight became NaN or infinite."""


class Loader(Protocol):
    samples: int

    def epoch(self, epoch: int, consumed: int = 0) -> Iterator[TrainStep]: ...


Validate = Callable[[nn.Module, int], Mapping[str, float]]
"""Figures of a network on the validation split after an epoch, counted from 1; the same on every
rank."""


@dataclass
class _Window:
    """What has happened since the last logging step. Tensors stay on the device until then."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    seen: int = 0
    losses: list[tuple[int, list[str], Tensor]] = field(default_factory=list)
    waited_seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)


def resolve_precision(asked: str, device: str) -> str:
    """`auto` is bf16 where the hardware multiplies it: such GPUs, and CPUs with AVX512-BF16."""
    if asked != "auto":
        return asked
    if device != "cpu":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def seed_for(*parts: object) -> int:
    """A seed that depends on all of `parts`, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class Training:
    """One training on one rank. `run()` trains to the end or to early stopping."""

    def __init__(
        self,
        *,
        family: Family[Any],
        recipe: Recipe,
        card: Card,
        data: DataSpec,
        loader: Loader,
        validate: Validate,
        world: World,
        emit: Emit,
        folder: Path,
        state: State | None = None,
        on_first_batch: Callable[[Batch], None] | None = None,
        sample_log: SampleLog | None = None,
        until_epoch: int | None = None,
    ) -> None:
        """`state` is a checkpoint to go on from; `on_first_batch` is shown the first batch of the
        training as the network sees it, on rank 0; `sample_log` is told the samples of each step; after
        `until_epoch` epochs it stops, with a rate that is on its way to the recipe's last epoch."""
        self.family, self.recipe, self.card, self.data = family, recipe, card, data
        self.loader, self.validate, self.world, self.emit = loader, validate, world, emit
        self.folder, self.on_first_batch, self.sample_log = folder, on_first_batch, sample_log
        self.config = recipe.config()
        self.precision = resolve_precision(recipe.train.precision, world.device)
        self.transform = family.augment(recipe.augment_settings(), data, train=True)
        self.progress = state.progress if state else Progress()
        self.until_epoch = min(until_epoch or recipe.train.epochs, recipe.train.epochs)
        self.total_samples = loader.samples * recipe.train.epochs

        torch.manual_seed(recipe.seed)
        self.module = family.build(self.config, data).to(world.device)
        if state:
            self.module.load_state_dict(state.training)
        else:
            family.warm_start(self.config, self.module)
        if recipe.train.channels_last:
            self.module.to(memory_format=torch.channels_last)
        self.ema = self._average(state) if recipe.train.ema else None
        self.bare = dict(family.parts(self.module))
        self.optimizers = {p: optim.build(m, self._optim(p)) for p, m in self.bare.items()}
        if state:
            for part, optimizer in self.optimizers.items():
                checkpoints.unpack_optimizer(optimizer, state.optimizers[part])
        self.parts: dict[str, nn.Module] = {}
        self.frozen: frozenset[str] | None = None
        self.window = _Window()
        self.images_per_second = 0.0

    @property
    def answering(self) -> nn.Module:
        """The network that answers: the moving average where there is one."""
        return self.ema.module if self.ema else self.module

    def run(self) -> Progress:
        train = self.recipe.train
        while self.progress.epoch < self.until_epoch:
            if train.patience and self.progress.stale_epochs >= train.patience:
                break
            self._freeze(self.progress.epoch)
            self._epoch()
            self._close_epoch()
        return self.progress

    def _average(self, state: State | None) -> AveragedModel:
        average = get_ema_multi_avg_fn(self.recipe.train.ema)  # type: ignore[no-untyped-call]
        ema = AveragedModel(self.module, multi_avg_fn=average, use_buffers=True)
        if state:
            ema.module.load_state_dict(state.weights)
            ema.n_averaged.fill_(state.progress.step)
        return ema

    def _optim(self, part: str) -> Any:
        if part not in self.recipe.optim:
            raise TesseraError(f"the recipe has no optimizer for {self.family.name}'s {part!r}")
        return self.recipe.optim[part]

    def _freeze(self, epoch: int) -> None:
        """Sets what is trained in this epoch; DDP is made anew when that changes."""
        frozen = self.family.frozen(self.config, self.module, epoch)
        if frozen == self.frozen:
            return
        self.frozen = frozen
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.parts = {p: distributed.wrap(m, self.world) for p, m in self.bare.items()}

    def _train_mode(self) -> None:
        self.module.train()
        if self.frozen:  # a frozen norm keeps its statistics too
            for module in self.module.modules():
                own = list(module.parameters(recurse=False))
                if own and not any(p.requires_grad for p in own):
                    module.eval()

    def _epoch(self) -> None:
        progress, recipe = self.progress, self.recipe
        self._train_mode()
        self.window = _Window()
        steps = iter(self.loader.epoch(progress.epoch, progress.consumed))
        while True:
            asked = time.perf_counter()
            step = next(steps, None)
            self.window.waited_seconds += time.perf_counter() - asked
            if step is None:
                break
            self._step(step)
            if self.sample_log:
                used = step.batch["index"][: step.counted].tolist()
                self.sample_log.note(step=progress.step, epoch=progress.epoch, samples=used)
            progress.consumed = step.consumed
            progress.seen += step.total
            progress.step += 1
            if progress.step % recipe.train.log_every_steps == 0:
                self._log()
            every = recipe.checkpoint.every_steps
            if every and progress.step % every == 0 and step.consumed < self.loader.samples:
                self._log()
                self._save()
        self._log()

    def _step(self, step: TrainStep) -> None:
        progress, train = self.progress, self.recipe.train
        rate = optim.factor(self.recipe.schedule, progress.seen, self.total_samples)
        for part, optimizer in self.optimizers.items():
            optim.set_rate(optimizer, self._optim(part).lr * rate)
        seed = (self.recipe.seed, progress.epoch, progress.step)
        # Dropout's masks are a function of the step, so that a resumed training has the same.
        torch.manual_seed(seed_for("step", *seed, self.world.rank))
        draws = BatchRng(seed_for("augment", *seed), step.total, step.rows)
        batch = self.transform(to_device(step.batch, self.world.device), draws)
        if train.channels_last and batch["image"].ndim == 4:
            batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
        if self.on_first_batch and progress.step == 0 and self.world.leads:
            self.on_first_batch(batch)
        self._update(batch, step)
        if self.ema:
            self.ema.update_parameters(self.module)
        self.window.seen += step.total
        self.window.count += step.counted

    def _update(self, batch: Batch, step: TrainStep) -> None:
        """Applies the family's updates. A batch cut in pieces (accumulation) keeps its gradients
        on the rank until the last piece; the pieces' updates go in step with one another."""
        rows = len(batch["key"])
        pieces = list(_cut(batch, min(self.recipe.train.accumulate, rows)))
        updates = [self.family.updates(self.parts, piece) for piece in pieces]
        while True:
            part = ""
            for i, (piece, update) in enumerate(zip(pieces, updates)):
                waiting = () if i == len(pieces) - 1 else self.parts.values()
                with distributed.no_sync(waiting):
                    with autocast(self.world.device, self.precision), _named_refusals(piece):
                        item = next(update, None)
                    if item is None:
                        return
                    part, losses = item
                    counted = len(piece["key"]) if step.counted else 0
                    # DDP takes the mean over ranks; with this the gradient is that of the mean
                    # over the global batch, however it was split.
                    share = counted * self.world.size / step.total
                    (losses["loss"] * share).backward()  # type: ignore[no-untyped-call]
                self._note(part, losses, counted, piece)
            optimizer = self.optimizers[part]
            if self.recipe.train.clip_norm:
                parameters = self.bare[part].parameters()
                nn.utils.clip_grad_norm_(parameters, self.recipe.train.clip_norm)
            optimizer.step()
            for other in self.optimizers.values():
                other.zero_grad(set_to_none=True)

    def _note(self, part: str, losses: Mapping[str, Tensor], counted: int, batch: Batch) -> None:
        """Adds to the window without looking at the values, which would wait for the device."""
        if not counted:
            return
        prefix = "" if len(self.bare) == 1 else f"{part}/"
        for name, value in losses.items():
            key = prefix + name
            total = value.detach().double() * counted
            self.window.sums[key] = self.window.sums.get(key, torch.zeros_like(total)) + total
        self.window.losses.append((self.progress.step, batch["key"], losses["loss"].detach()))

    def _log(self) -> None:
        """Sends the window's means over all ranks; stops the training if one is not finite."""
        window, progress = self.window, self.progress
        if not window.seen:
            return
        # Ranks agree on the names: one without a counted row has none of its own.
        names = distributed.broadcast(sorted(window.sums), self.world)
        zero = torch.zeros((), dtype=torch.float64, device=self.world.device)
        stacked = torch.stack([window.sums.get(n, zero) for n in names])
        extra = torch.tensor([float(window.count), window.waited_seconds], dtype=torch.float64)
        summed = distributed.all_sum(torch.cat([stacked, extra.to(stacked.device)]), self.world)
        values = summed.tolist()  # device sync
        self._check_finite(values)
        seconds = time.perf_counter() - window.began
        count = values[-2]
        self.images_per_second = window.seen / seconds
        if self.world.leads:
            means = {f"train/{n}": v / count for n, v in zip(names, values)}
            rates = {f"train/lr/{p}": o.param_groups[0]["lr"] for p, o in self.optimizers.items()}
            if len(rates) == 1:
                rates = {"train/lr": next(iter(rates.values()))}
            speed = {
                "train/images_per_second": self.images_per_second,
                "train/data_wait_share": values[-1] / self.world.size / seconds,
            }
            self._emit_metrics(progress.step, {**means, **rates, **speed})
        self.window = _Window()

    def _check_finite(self, values: list[float]) -> None:
        if all(v == v and abs(v) != float("inf") for v in values):
            return
        found = None
        for step, keys, loss in self.window.losses:
            if not bool(torch.isfinite(loss).all()):
                found = (step, keys)
                break
        everyone = distributed.gather(found, self.world)
        first = None
        if everyone is not None:
            first = min((f for f in everyone if f), key=lambda f: int(f[0]), default=None)
        first = distributed.broadcast(first, self.world)
        step, keys = first or (self.progress.step, [])
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        raise NotFiniteError(
            f"the loss is not finite at step {step + 1}, in a batch with: {shown}",
            hint="lower optim.model.lr, set train.clip_norm=1, or look at these samples; "
            "the last checkpoint is from before and can be resumed",
        )

    def _close_epoch(self) -> None:
        """Validates, then commits the epoch with a checkpoint."""
        progress = self.progress
        self._agree()
        began = time.perf_counter()
        metrics = dict(self.validate(self.answering, progress.epoch + 1))
        seconds = time.perf_counter() - began
        progress.epoch += 1
        progress.consumed = 0
        primary = self.family.task.primary
        value = metrics[primary.name]
        best = progress.best_value
        improved = best is None or primary.better(value, best)
        progress.stale_epochs = 0 if improved else progress.stale_epochs + 1
        if improved or value == best:  # of equals the later one: its rate has come further down
            progress.best_value, progress.best_step = value, progress.step
            progress.best_epoch = progress.epoch
        if self.world.leads:
            values = {f"val/{name}": v for name, v in metrics.items()}
            values["val/seconds"] = seconds
            self._emit_metrics(progress.epoch, values)
        self._save()

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

    def _agree(self) -> None:
        """The ranks' running statistics become one, in the network and in its average."""
        distributed.average_buffers(self.module, self.world)
        if self.ema:
            distributed.average_buffers(self.ema.module, self.world)

    def _save(self) -> None:
        """Commits: when this returns on any rank, the checkpoint is whole and the events before it
        are on disk."""
        self._agree()
        weights = self.answering.state_dict()
        for name, tensor in self.module.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NotFiniteError(
                    f"the weight {name!r} is not finite after step {self.progress.step}",
                    hint="lower optim.model.lr or set train.clip_norm=1; the last checkpoint is "
                    "from before and can be resumed",
                )
        if self.world.leads:
            self.emit.flush()
            path = checkpoints.save(
                self.folder,
                weights=weights,
                training=self.module.state_dict() if self.ema else None,
                optimizers=self.optimizers,
                recipe=self.recipe,
                card=self.card,
                progress=self.progress,
            )
            checkpoints.prune(
                self.folder, keep=self.recipe.checkpoint.keep, best_step=self.progress.best_step
            )
            self.emit({"kind": "checkpoint", "path": path.name, "step": self.progress.step})
        distributed.broadcast(None, self.world)  # collective: nobody runs ahead of the commit


@contextmanager
def _named_refusals(batch: Batch) -> Iterator[None]:
    """torch's refusal to normalise over one value is the user's to mend, and no worker's fault that
    another attempt would mend."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TesseraError(
            f"a rank has {len(batch['key'])} image of a batch, and the network can't normalise over "
            "it: its maps have shrunk to one pixel",
            hint="choose train.batch_size so that the last batch of an epoch has several images for "
            "each worker, or a smaller train.accumulate, or larger images: data.height, data.width",
        ) from None


def _cut(batch: Batch, pieces: int) -> Iterator[Batch]:
    rows = len(batch["key"])
    edges = [rows * i // pieces for i in range(pieces + 1)]
    for start, end in itertools.pairwise(edges):
        yield {name: value[start:end] for name, value in batch.items()}
