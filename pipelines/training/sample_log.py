"""Which samples a training has used: the proof that each was used once in every epoch.

In: the samples of each step, from every rank. Out: a line a step in `sample_log/ATTEMPT-RANK.jsonl` of
the run's folder, and read again, the samples of each epoch. Must not know what is trained.

A training that was killed does the steps since its last checkpoint again. What the killed attempt
wrote of those steps never reached the weights that are kept, so an attempt that begins at step s
takes back all lines from s on of those before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.interfaces import World
from pipelines.training import distributed

FOLDER = "sample_log"


class SampleLog:
    """This rank's file. A line is with the operating system before `note` returns, so it outlives
    the process, though not the machine."""

    def __init__(self, run_dir: Path, world: World, *, step: int) -> None:
        """Called by all ranks. `step` is the number of steps that the weights have had."""
        folder = run_dir / FOLDER
        attempt = None
        if world.leads:
            folder.mkdir(parents=True, exist_ok=True)
            attempt = 1 + max((int(p.name.split("-")[0]) for p in folder.iterdir()), default=-1)
        attempt = distributed.broadcast(attempt, world)
        path = folder / f"{attempt:04d}-{world.rank:04d}.jsonl"
        self._file = path.open("xb", buffering=0)
        self._write({"begins": step, "ranks": world.size})

    def write_step(self, step: int, *, epoch: int, samples: Sequence[int]) -> None:
        """Records the positions of the samples that this rank used in a step, after the step."""
        self._write({"step": step, "epoch": epoch, "samples": list(samples)})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def read(run_dir: Path) -> dict[int, list[int]]:
    """Epoch -> the samples of its steps that count, in the order of the steps and ranks."""
    kept: dict[int, tuple[int, list[int]]] = {}
    attempts: dict[str, list[Path]] = {}
    for path in sorted((run_dir / FOLDER).iterdir()):
        attempts.setdefault(path.name.split("-")[0], []).append(path)
    for paths in attempts.values():
        parts = [[json.loads(line) for line in path.read_bytes().splitlines()] for path in paths]
        begins = {part[0]["begins"] for part in parts}
        ranks = {part[0]["ranks"] for part in parts}
        if len(begins) != 1 or ranks != {len(parts)}:
            raise TesseraError(f"the ledger of {run_dir} has an attempt whose ranks don't agree")
        first = begins.pop()
        kept = {step: said for step, said in kept.items() if step < first}
        for part in parts:
            for line in part[1:]:
                _, samples = kept.setdefault(line["step"], (line["epoch"], []))
                samples.extend(line["samples"])
    epochs: dict[int, list[int]] = {}
    for step in sorted(kept):
        epoch, samples = kept[step]
        epochs.setdefault(epoch, []).extend(samples)
    return epochs
