"""Where a training's checkpoints are saved, and how they are found again.

In: tensors and progress of a training, or the name of a checkpoint. Out: complete checkpoints in
the run's folder, or in its storage. Must not know the training loop, Ray or MLflow.

Without a storage, a save is a commit: when it returns, the checkpoint and all earlier events are on
disk. With one, the upload runs beside the training:

    step   training thread                        upload thread
    36     writes step-36 to the local disk       uploads the files of step-36
    37     trains                                 publishes the event log, then the manifest of 36:
    40     trains                                 step-36 is committed; older ones are removed
    72     writes step-72 …                       … a save waits for the upload before it
"""

from __future__ import annotations

import shutil
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError
from pipelines.interfaces import Emit
from pipelines.training import checkpoints
from pipelines.training.checkpoints import DamagedError, State
from pipelines.training.run import CHECKPOINTS
from pipelines.training.run_storage import RunStorage


class CheckpointFolder:
    """Checkpoints in a folder that all workers see. Only the leading rank saves."""

    def __init__(self, folder: Path, emit: Emit, *, keep: int) -> None:
        self.folder, self._emit, self._keep = folder, emit, keep
        self.where = str(folder)
        self.damaged: list[str] = []
        """Names of the checkpoints that `newest` found damaged."""

    def newest(self) -> State | None:
        """The newest intact checkpoint; None without one. Emits a notice for each newer one that is
        damaged."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state, notices = checkpoints.newest(self.folder)
        for line in notices:
            self._emit({"kind": "notice", "text": line})
        names = sorted(path.name for path in self.folder.glob("step-*"))
        self.damaged = [name for name in names if not state or name > state.path.name]
        return state

    def load(self, name: str) -> State:
        """Reads a checkpoint that was committed. Any rank may call this."""
        return checkpoints.load(self.folder / name)

    def save(self, **content: Any) -> None:
        """Commits a checkpoint: when this returns, it is complete, all earlier events are on disk,
        and older ones are removed. Takes the arguments of `checkpoints.save`."""
        self._emit.flush()
        path = checkpoints.save(self.folder, **content)
        self._prune(content["progress"].best_step)
        self._emit({"kind": "checkpoint", "path": path.name, "step": content["progress"].step})

    def wait(self) -> None:
        """Returns when everything that was saved is committed."""

    def raise_failure(self) -> None:
        """Raises TesseraError if a checkpoint couldn't be committed."""

    def _prune(self, best_step: int | None) -> None:
        checkpoints.prune(self.folder, keep=self._keep, best_step=best_step)


class PublishedCheckpoints(CheckpointFolder):
    """Checkpoints in a storage; those in the folder are copies on this machine. A save returns when
    the copy is written, and the upload commits it; see the timeline above."""

    def __init__(self, folder: Path, emit: Emit, storage: RunStorage, *, keep: int) -> None:
        super().__init__(folder, emit, keep=keep)
        self.where = f"{storage.where}/{CHECKPOINTS}"
        self._storage = storage
        self._upload: threading.Thread | None = None
        self._failure: TesseraError | None = None

    def newest(self) -> State | None:
        complete, partial = self._storage.complete_folders(CHECKPOINTS)
        for name in partial:  # left by an upload that was interrupted
            self._storage.remove_folder(f"{CHECKPOINTS}/{name}")
        for path in self.folder.glob("step-*"):
            if path.name not in complete:  # saved here, but never committed
                shutil.rmtree(path, ignore_errors=True)
        for name in reversed(complete):
            try:
                return self.load(name)
            except DamagedError as error:
                self.damaged.append(name)
                text = f"checkpoint {name} is damaged and ignored: {error.message}"
                self._emit({"kind": "notice", "text": text})
                self._storage.remove_folder(f"{CHECKPOINTS}/{name}")
        return None

    def load(self, name: str) -> State:
        self._storage.fetch_folder(f"{CHECKPOINTS}/{name}", self.folder / name)
        return checkpoints.load(self.folder / name)

    def save(self, **content: Any) -> None:
        self.wait()
        path = checkpoints.save(self.folder, **content)
        progress = asdict(content["progress"])  # as it is now: the training goes on
        self._upload = threading.Thread(
            target=self._publish,
            args=(path, progress["step"], progress["best_step"]),
            name="checkpoint-upload",
            daemon=True,
        )
        self._upload.start()

    def wait(self) -> None:
        if self._upload is not None:
            self._upload.join()
            self._upload = None
        self.raise_failure()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _publish(self, path: Path, step: int, best_step: int | None) -> None:
        try:
            # Events come before the manifest: what a checkpoint was trained with must be known
            # wherever it is resumed.
            self._storage.publish_folder(
                path, f"{CHECKPOINTS}/{path.name}", complete=self._emit.flush
            )
            self._emit({"kind": "checkpoint", "path": path.name, "step": step})
            complete, partial = self._storage.complete_folders(CHECKPOINTS)
            for name in [*checkpoints.outdated(complete, self._keep, best_step), *partial]:
                self._storage.remove_folder(f"{CHECKPOINTS}/{name}")
            self._prune(best_step)
        except Exception as error:
            reason = error.message if isinstance(error, TesseraError) else str(error)
            self._failure = TesseraError(
                f"checkpoint {path.name} can't be uploaded: {reason}",
                hint="the checkpoint before it is complete; when the storage is back, use --resume",
            )


def fetch_all(address: str, folder: Path) -> None:
    """Makes the checkpoints in the local folder those of a run's storage. A damaged one is left
    out."""
    storage = RunStorage.open(address)
    complete, _ = storage.complete_folders(CHECKPOINTS)
    for path in folder.glob("step-*"):
        if path.name not in complete:
            shutil.rmtree(path)
    for name in complete:
        with suppress(DamagedError):
            storage.fetch_folder(f"{CHECKPOINTS}/{name}", folder / name)


def replace_all(address: str, folder: Path) -> None:
    """Makes the checkpoints in a run's storage those of the local folder."""
    storage = RunStorage.open(address)
    names = sorted(path.name for path in folder.glob("step-*"))
    for name in names:
        storage.publish_folder(folder / name, f"{CHECKPOINTS}/{name}")
    complete, partial = storage.complete_folders(CHECKPOINTS)
    for name in {*complete, *partial} - set(names):
        storage.remove_folder(f"{CHECKPOINTS}/{name}")
