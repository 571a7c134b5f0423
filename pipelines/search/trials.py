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

MOST_REASONS = 5
"""So many different reasons of failed trials are named in a message."""

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
    """The best first; then trials that failed, whatever they had reached, and those without a
    value, by number."""
    sign = -1.0 if metric.direction == "max" else 1.0

    def key(trial: Trial) -> tuple[bool, bool, float, int]:
        value = 0.0 if trial.value is None else sign * trial.value
        return trial.value is None, trial.status == "failed", value, trial.number

    return sorted(trials, key=key)


def best(trials: Iterable[Trial], metric: Metric) -> Trial | None:
    """The best trial that didn't fail; None if no such trial has a value."""
    first = next(iter(ranked(trials, metric)), None)
    return first if first and first.value is not None and first.status != "failed" else None


def winner(trials: Sequence[Trial], metric: Metric) -> Trial:
    """The best trial. Raises TesseraError with all reasons, the most frequent first, if every
    trial failed or has no value."""
    first = best(trials, metric)
    if first is None:
        raise TesseraError(
            f"none of {len(trials)} trials succeeded: {reasons(trials)}",
            hint="narrow the space (--space FILE), or train one trial's settings with `tessera "
            "train` to see more",
        )
    return first


def reasons(trials: Iterable[Trial]) -> str:
    """Why trials failed, as text: each reason once, with its trials, the most frequent first."""
    groups: dict[str, list[int]] = {}
    for trial in trials:
        groups.setdefault(trial.reason or f"{trial.status}, without a metric", []).append(
            trial.number
        )
    parts = []
    for reason, numbers in sorted(groups.items(), key=lambda item: (-len(item[1]), item[1])):
        some = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
        parts.append(f"{reason} (trial{'s' if len(numbers) > 1 else ''} {some})")
    more = len(parts) - MOST_REASONS
    return "; ".join(parts[:MOST_REASONS]) + (f"; and {more} other reasons" if more > 0 else "")


def write(trials: Sequence[Trial], file: Path) -> None:
    """Writes the trials atomically."""
    write_json_atomic(file, [asdict(t) for t in trials])


def read(file: Path) -> list[Trial]:
    """Reads the trials; an empty list if there is no file."""
    return parse(file.read_bytes()) if file.exists() else []


def parse(content: bytes) -> list[Trial]:
    """Reads the content of the file."""
    rows = json.loads(content)
    return [Trial(**{**t, "curve": [(int(e), float(v)) for e, v in t["curve"]]}) for t in rows]
