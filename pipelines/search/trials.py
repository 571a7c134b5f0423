"""The trials of a search: their status, ranking, and file.

In: what a search reports. Out: trials, the best first. Must not know Ray Tune or MLflow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.core.errors import TesseraError
from models.core.family import Metric
from pipelines.storage.atomic import write_json_atomic

Status = Literal["waiting", "running", "finished", "stopped", "failed"]

TRIALS = "trials.json"
"""In a search's folder: the standing of its trials."""


@dataclass
class Trial:
    """One training of a search. `settings` are what was sampled, `value` the best of the figure so
    far and `epoch` where it was reached; `curve` has the figure of each epoch. A member of a
    population waits for the others between its generations; `settings` are then those in effect,
    and `changes` has all of them (`population.Member`)."""

    id: str
    number: int
    settings: dict[str, Any]
    run: str = ""
    run_id: str = ""
    status: Status = "waiting"
    value: float | None = None
    epoch: int = 0
    seconds: float = 0.0
    reason: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether anything more can become of it."""
        return self.status not in ("waiting", "running")

    def note(self, epoch: int, value: float, metric: Metric) -> None:
        """What was found after an epoch; one that is told again counts once, and what is not finite
        not at all."""
        if not math.isfinite(value) or any(seen == epoch for seen, _ in self.curve):
            return
        self.curve.append((epoch, value))
        if self.value is None or better(value, self.value, metric.direction):
            self.value, self.epoch = value, epoch

    def take_over(self, donor: Trial) -> None:
        """Its weights are the donor's now, and so is the best that they came to."""
        self.value, self.epoch = donor.value, donor.epoch


def better(one: float, other: float, direction: str) -> bool:
    return one > other if direction == "max" else one < other


def ranked(trials: Iterable[Trial], metric: Metric) -> list[Trial]:
    """The best first; those without a figure last, in their order."""
    sign = -1.0 if metric.direction == "max" else 1.0
    return sorted(
        trials,
        key=lambda t: (t.value is None, sign * t.value if t.value is not None else 0.0, t.number),
    )


def winner(trials: Sequence[Trial], metric: Metric) -> Trial:
    """Raises TesseraError where no trial came to a figure."""
    first = next((t for t in ranked(trials, metric) if t.value is not None), None)
    if first is None:
        reasons = sorted({t.reason for t in trials if t.reason})
        said = f": {reasons[0]}" if reasons else ""
        raise TesseraError(f"none of {len(trials)} trials came to a figure{said}")
    return first


def write(trials: Sequence[Trial], file: Path) -> None:
    """Writes the trials atomically."""
    write_json_atomic(file, [asdict(t) for t in trials])


def read(file: Path) -> list[Trial]:
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    return [Trial(**{**t, "curve": [(int(e), float(v)) for e, v in t["curve"]]}) for t in found]
