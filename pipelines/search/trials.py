"""The trials of a search: their state, ranking, and file.

In: what a search reports of its trials. Out: trials, the best first, and trials.json. Must not know
Ray Tune or MLflow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from models.core.errors import TesseraError
from models.core.family import Metric
from pipelines.storage.atomic import write_json_atomic

Status = Literal["waiting", "running", "finished", "stopped", "failed"]

TRIALS = "trials.json"
"""In a search's folder: the state of its trials."""


class SettingsChange(TypedDict):
    """The settings of a member from `epoch` on (counted from 1). If it copied weights: the id of
    the `donor`, and the digest of the `checkpoint` once it is copied."""

    epoch: int
    settings: dict[str, Any]
    donor: NotRequired[str]
    checkpoint: NotRequired[str]


@dataclass
class Trial:
    """One training of a search. `settings` are the sampled ones, `value` the best value of the
    metric so far and `epoch` the epoch of it; `curve` has the value of each epoch. A population's
    member waits for the others between generations; its `settings` are the current ones, and
    `changes` has all of them (`population.Member`)."""

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
    changes: list[SettingsChange] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether its status is final."""
        return self.status not in ("waiting", "running")

    def note(self, epoch: int, value: float, metric: Metric) -> None:
        """Adds the metric's value after an epoch. A repeated epoch and a value that is not finite
        are ignored."""
        if not math.isfinite(value) or any(seen == epoch for seen, _ in self.curve):
            return
        self.curve.append((epoch, value))
        if self.value is None or is_better(value, self.value, metric.direction):
            self.value, self.epoch = value, epoch

    def copy_from(self, donor: Trial) -> None:
        """After copying the donor's weights the trial has the donor's best value, too."""
        self.value, self.epoch = donor.value, donor.epoch


def is_better(one: float, other: float, direction: str) -> bool:
    return one > other if direction == "max" else one < other


def ranked(trials: Iterable[Trial], metric: Metric) -> list[Trial]:
    """The best first; trials without a value last, by number."""
    sign = -1.0 if metric.direction == "max" else 1.0
    return sorted(
        trials,
        key=lambda t: (t.value is None, sign * t.value if t.value is not None else 0.0, t.number),
    )


def winner(trials: Sequence[Trial], metric: Metric) -> Trial:
    """The best trial. Raises TesseraError if no trial has a value."""
    first = next((t for t in ranked(trials, metric) if t.value is not None), None)
    if first is None:
        reasons = sorted({t.reason for t in trials if t.reason})
        first_reason = f": {reasons[0]}" if reasons else ""
        raise TesseraError(f"none of {len(trials)} trials has a metric{first_reason}")
    return first


def write(trials: Sequence[Trial], file: Path) -> None:
    """Writes the trials atomically."""
    write_json_atomic(file, [asdict(t) for t in trials])


def read(file: Path) -> list[Trial]:
    """Reads the trials; an empty list if there is no file."""
    if not file.exists():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [Trial(**{**t, "curve": [(int(e), float(v)) for e, v in t["curve"]]}) for t in rows]
