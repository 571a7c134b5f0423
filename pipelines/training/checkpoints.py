"""Checkpoints and models on disk: directories that show themselves whether they are intact.

In: tensors, recipe, card, progress. Out: a directory with a manifest of checksums, and back.
Nothing in it is ever unpickled: tensors are safetensors, the rest is JSON. Must not know where the
directory goes afterwards.

    weights.safetensors    the weights for predictions (the EMA's if there is one)
    training.safetensors   the weights that are trained, only with an EMA
    optimizer.safetensors  the optimizers' tensors; optimizer.json has their other state
    recipe.json  card.json  progress.json
    manifest.json          size and sha256 of every file; its own sha256 is the directory's digest
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.recipe import Recipe
from pipelines.storage.atomic import replace_folder

MANIFEST = "manifest.json"
MODEL_FILES = ("weights.safetensors", "recipe.json", "card.json")


class DamagedError(TesseraError):
    """A directory whose files differ from its manifest."""


@dataclass
class Progress:
    """How far a training is.

    Args:
        epoch: Epochs that are complete.
        consumed: Samples of the next epoch that are trained already.
        step: Optimizer steps in all epochs.
        seen: Samples in all epochs.
        best_value: Best primary metric on the validation split; None before the first epoch.
        best_step: Step of the checkpoint with that value.
        best_epoch: Its epoch, counted from 1.
        stale_epochs: Epochs since the best value last improved.
    """

    epoch: int = 0
    consumed: int = 0
    step: int = 0
    seen: int = 0
    best_value: float | None = None
    best_step: int | None = None
    best_epoch: int | None = None
    stale_epochs: int = 0


@dataclass(frozen=True)
class State:
    """A checkpoint in memory. `optimizers` is part -> state, as `pack_optimizer` returns it."""

    path: Path
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    optimizers: dict[str, Any]
    recipe: Recipe
    card: Card
    progress: Progress


@dataclass(frozen=True)
class Model:
    """A trained network: all that its predictions depend on. `digest` is that of its files."""

    weights: dict[str, Tensor]
    recipe: Recipe
    card: Card
    digest: str


def name_of(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:09d}"


def save(
    folder: Path,
    *,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Tensor] | None,
    optimizers: Mapping[str, Optimizer],
    recipe: Recipe,
    card: Card,
    progress: Progress,
) -> Path:
    """Writes the folder `step-NNNNNNNNN` below `folder`, complete or not at all; returns its path.
    Raises TesseraError if it can't be written."""
    target = folder / name_of(progress.step)
    try:
        # A folder that is there has the same step, from before a restart.
        with replace_folder(target) as part_folder:
            _save_tensors(weights, part_folder / "weights.safetensors")
            if training is not None:
                _save_tensors(training, part_folder / "training.safetensors")
            tensors: dict[str, Tensor] = {}
            numbers: dict[str, Any] = {}
            for part, optimizer in optimizers.items():
                packed, numbers[part] = pack_optimizer(optimizer)
                tensors.update({f"{part}/{key}": value for key, value in packed.items()})
            _save_tensors(tensors, part_folder / "optimizer.safetensors")
            _write(part_folder / "optimizer.json", json.dumps(numbers, indent=1))
            _write(part_folder / "recipe.json", recipe.to_json())
            _write(part_folder / "card.json", card.to_json())
            _write(part_folder / "progress.json", json.dumps(asdict(progress), indent=1))
            _seal(part_folder)
    except (OSError, SafetensorError) as error:  # which has no errno, only a text
        reason = getattr(error, "strerror", None) or _last_part(error)
        raise TesseraError(
            f"checkpoint {target} can't be written: {reason}",
            hint="the checkpoint before it is intact; free some space and use --resume",
        ) from error
    return target


def _last_part(error: Exception) -> str:
    """The reason in a text such as "Error while serializing: I/O error: No space left on device (os
    error 28)"."""
    return str(error).rpartition("error: ")[2].partition(" (os error")[0] or type(error).__name__


def load(path: Path) -> State:
    """Reads a checkpoint. Raises DamagedError unless every byte is what was written."""
    verify(path)
    try:
        weights = load_file(path / "weights.safetensors")
        training_file = path / "training.safetensors"
        training = load_file(training_file) if training_file.exists() else weights
        tensors = load_file(path / "optimizer.safetensors")
        numbers = json.loads((path / "optimizer.json").read_text(encoding="utf-8"))
        progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise DamagedError(f"checkpoint {path.name} can't be read: {error}") from None
    optimizers = {
        part: (
            {k.removeprefix(f"{part}/"): v for k, v in tensors.items() if k.startswith(f"{part}/")},
            numbers[part],
        )
        for part in numbers
    }
    recipe, card = read_identity(path)
    return State(path, weights, training, optimizers, recipe, card, progress)


def newest(folder: Path) -> tuple[State | None, list[str]]:
    """The newest intact checkpoint, and a line for each newer one that is damaged."""
    notices: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load(path), notices
        except TesseraError as error:
            notices.append(f"checkpoint {path.name} is damaged and ignored: {error.message}")
    return None, notices


def copy_checkpoints(source: Path, target: Path) -> str:
    """Replaces the checkpoints in `target` by copies of the newest and the best one in `source`;
    returns the digest of the newest. The checksums of the copies are verified."""
    state, notices = newest(source)
    if state is None:
        raise TesseraError(f"{source} has no intact checkpoint", hint="; ".join(notices))
    best = name_of(state.progress.best_step) if state.progress.best_step else state.path.name
    try:
        with replace_folder(target) as copies:
            for name in {state.path.name, best}:
                shutil.copytree(source / name, copies / name)
                verify(copies / name)
            digest = verify(copies / state.path.name)
    except OSError as error:
        raise TesseraError(
            f"checkpoint {state.path} can't be copied: {error.strerror or error}",
            hint="free some space and use --resume",
        ) from error
    return digest


def prune(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and the best, and parts of crashed writes."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for name in outdated([path.name for path in folder.glob("step-*")], keep, best_step):
        shutil.rmtree(folder / name, ignore_errors=True)


def outdated(names: Iterable[str], keep: int, best_step: int | None) -> list[str]:
    """The names of all checkpoints but the newest `keep` and the best."""
    older = sorted(names, reverse=True)[keep:]
    return [name for name in older if best_step is None or name != name_of(best_step)]


def write_model(checkpoint: Path, target: Path) -> str:
    """Writes the directory to register, from a checkpoint that is verified first; returns its
    digest. The digest also covers files that are in `target` already, such as the exported form."""
    verify(checkpoint)
    target.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(checkpoint / name, target / name)
    return _seal(target)


def read_model(path: Path, digest: str | None = None) -> Model:
    """Reads a model directory. Raises DamagedError unless its files match its manifest, and
    `digest` if one is given."""
    actual = check_digest(path, digest) if digest is not None else verify(path)
    try:
        weights = load_file(path / "weights.safetensors")
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"the model's weights can't be read: {error}") from None
    recipe, card = read_identity(path)
    return Model(weights, recipe, card, actual)


def check_digest(path: Path, digest: str) -> str:
    """Raises DamagedError unless every file is the one that was registered under `digest`."""
    actual = verify(path)
    if actual != digest:
        raise DamagedError(
            f"the model's files are not those that were registered: digest {actual[:12]}…, "
            f"registered {digest[:12]}…",
            hint="don't use this version; register the model again from its run",
        )
    return actual


def verify(path: Path) -> str:
    """Compares every file with the manifest; returns the sha256 of the manifest itself. Raises
    DamagedError that names a file which differs."""
    try:
        raw = (path / MANIFEST).read_bytes()
    except OSError:
        raise DamagedError(f"{path.name} has no readable {MANIFEST}") from None
    for name, size_bytes, sha256 in parse_manifest(raw, path.name):
        file = path / name
        if not file.is_file():
            raise DamagedError(f"file {name} is missing")
        if file.stat().st_size != size_bytes or _sha256(file) != sha256:
            raise DamagedError(
                f"file {name} has changed since it was written: its checksum differs"
            )
    return hashlib.sha256(raw).hexdigest()


def parse_manifest(raw: bytes, folder: str) -> list[tuple[str, int, str]]:
    """The path, size in bytes and sha256 of each file that a manifest lists. `folder` is the name
    in errors. Raises DamagedError if it can't be read, or names a file outside of its folder."""
    try:
        entries = json.loads(raw)["files"]
        items = [(str(name), int(e["size_bytes"]), str(e["sha256"])) for name, e in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{folder} has no readable {MANIFEST}") from None
    for name, _, _ in items:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedError(f"{MANIFEST} names {name!r}, which is outside of the folder")
    return items


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state: its tensors by name, and the rest as plain JSON."""
    state = optimizer.state_dict()
    tensors = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    return tensors, {"groups": state["param_groups"], "plain": plain}


def unpack_optimizer(optimizer: Optimizer, packed: tuple[dict[str, Tensor], Any]) -> None:
    """Loads a packed state into an optimizer of the same parameters. Learning rate, momentum and
    the like stay as the optimizer was built: they come from the recipe, which may have changed."""
    tensors, numbers = packed
    groups = [
        {**saved, **{name: value for name, value in built.items() if name != "params"}}
        for saved, built in zip(numbers["groups"], optimizer.param_groups, strict=True)
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in numbers["plain"].items()}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # Fused kernels read both in memory order. With a contiguous momentum, a channels_last
            # weight would silently get the momentum of other weights.
            value = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def read_identity(path: Path) -> tuple[Recipe, Card]:
    """Recipe and card of a checkpoint or model directory. Verify its files first."""
    try:
        tree = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
        text = (path / "card.json").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path.name} has no readable recipe and card: {error}") from None
    recipe = recipes.build(tree)
    return recipe, cards.parse(text, f"{path.name}/card.json")


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # safetensors refuses tensors that share memory, and a channels_last one would be stored in
    # another order than it is read. The clone costs the memory of one copy of the weights.
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)
    _sync(path)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _seal(folder: Path) -> str:
    entries = {
        f.relative_to(folder).as_posix(): {"size_bytes": f.stat().st_size, "sha256": _sha256(f)}
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f != folder / MANIFEST
    }
    text = json.dumps({"files": entries}, indent=1, sort_keys=True)
    _write(folder / MANIFEST, text)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
