"""A log of the samples of each training step, which proves that each is used once in every epoch.

In: the samples of each step, from every rank. Out: a line for each step in
`sample_log/ATTEMPT-RANK.jsonl` of the run's folder; read back, the samples of each epoch. Must not
know what is trained.

A training that was killed repeats the steps since its last checkpoint. What the killed attempt did
in those steps never reached the saved weights, so its lines don't count:

    attempt 0   steps 0 1 2 3 4          killed; its last checkpoint was after step 2
    attempt 1           begins at 3: 3 4 5
    read back   steps 0 1 2 | 3 4 5      lines 3 and 4 of attempt 0 are dropped

With a storage, each rank's file is copied there before a checkpoint is saved; `fetch` brings the
files of all ranks to one machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.interfaces import World
from pipelines.storage.appended import AppendedFile
from pipelines.storage.base import Storage
from pipelines.training import distributed

FOLDER = "sample_log"


class SampleLog:
    """This rank's file. `write_step` returns after the line was written to the operating system, so
    it survives a crash of the process, but not of the machine."""

    def __init__(
        self, run_dir: Path, world: World, *, step: int, storage: Storage | None = None
    ) -> None:
        """Called by all ranks. `step` is the number of steps that the weights were trained for."""
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        attempt = None
        if world.leads:
            names = storage.folders(FOLDER) if storage else [p.name for p in folder.iterdir()]
            attempt = 1 + max((_attempt_of(name) for name in names), default=-1)
        attempt = distributed.broadcast(attempt, world)
        path = folder / f"{attempt:04d}-{world.rank:04d}.jsonl"
        # A file that is there was never published: another machine got this attempt's number.
        self._file = path.open("wb" if storage else "xb", buffering=0)
        self._write({"begins": step, "ranks": world.size})
        self._copy = AppendedFile(path, storage, f"{FOLDER}/{path.name}") if storage else None
        self.publish()
        distributed.broadcast(None, world)  # collective: the files of all ranks have begun

    def write_step(self, step: int, *, epoch: int, samples: Sequence[int]) -> None:
        """Records the positions of the samples that this rank used in a step, after the step."""
        self._write({"step": step, "epoch": epoch, "samples": list(samples)})

    def publish(self) -> None:
        """Copies what is new into the storage, if there is one."""
        if self._copy is not None:
            self._copy.publish()

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def fetch(storage: Storage, run_dir: Path) -> None:
    """Copies the files of all ranks from the storage into the run's folder."""
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    for name in storage.folders(FOLDER):
        AppendedFile(run_dir / FOLDER / name, storage, f"{FOLDER}/{name}").restore()


def _attempt_of(name: str) -> int:
    return int(name.split("-")[0])


def read(run_dir: Path) -> dict[int, list[int]]:
    """Epoch -> samples of its steps that count, in the order of steps and ranks.

    Raises TesseraError if a rank's file of an attempt is missing.
    """
    kept: dict[int, tuple[int, list[int]]] = {}
    attempts: dict[str, list[Path]] = {}
    for path in sorted((run_dir / FOLDER).glob("[!.]*")):
        attempts.setdefault(path.name.split("-")[0], []).append(path)
    for paths in attempts.values():
        parts = [[json.loads(line) for line in path.read_bytes().splitlines()] for path in paths]
        begins = {part[0]["begins"] for part in parts}
        ranks = {part[0]["ranks"] for part in parts}
        if all(len(part) == 1 for part in parts):
            continue  # a machine was lost before the first step
        if len(begins) != 1 or ranks != {len(parts)}:
            raise TesseraError(
                f"the sample log of {run_dir} has an attempt whose ranks don't agree"
            )
        first = begins.pop()
        kept = {step: line for step, line in kept.items() if step < first}
        for part in parts:
            for line in part[1:]:
                _, samples = kept.setdefault(line["step"], (line["epoch"], []))
                samples.extend(line["samples"])
    epochs: dict[int, list[int]] = {}
    for step in sorted(kept):
        epoch, samples = kept[step]
        epochs.setdefault(epoch, []).extend(samples)
    return epochs
