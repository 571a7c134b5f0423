"""A population's generations: all members train for some epochs, then the worst copy the weights of
the best and continue with settings near theirs.

In: a search's spec, and a leaderboard for what happens to the members. Out: trials that are trained
to their end. The state is in `population.json`, which is plain data: reading it executes nothing.
Ray Tune's own PBT scheduler isn't used: it loses its state when the driver is killed, the
records of members that aren't at the same epoch go back in time, and settings may leave the space.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.search import population
from pipelines.search.population import Member, Population
from pipelines.workflows import search_files, trial
from pipelines.workflows.trial import Segment, SegmentResult

if TYPE_CHECKING:
    from models.core.family import Metric
    from pipelines.workflows.search_board import Leaderboard, SearchSpec
    from pipelines.workflows.trial import TrialPayload

FILE = search_files.POPULATION


def run(
    spec: SearchSpec,
    metric: Metric,
    most_epochs: int,
    payload: TrialPayload,
    board: Leaderboard,
    at_once: int,
) -> None:
    """Runs all generations, from the one in population.json. None starts after the budget."""
    deadline = time.monotonic() + (spec.budget_seconds or float("inf"))
    current = population.read(spec.folder / FILE)
    if current is None:
        current = population.begin(spec.parsed_space(), spec.trials, spec.seed)
        _write(current, spec)
    while True:
        until = min((current.generation + 1) * spec.interval_epochs, most_epochs)
        first = current.generation * spec.interval_epochs + 1
        if not current.ready:
            _copy_weights(current, spec, board)
            current.ready = True
            _write(current, spec)
        _train(current, spec, payload, board, at_once, first, until)
        if until >= most_epochs or not _any_left(current) or time.monotonic() > deadline:
            break
        population.advance(
            current,
            spec.parsed_space(),
            direction=metric.direction,
            seed=spec.seed,
            epoch=until + 1,
        )
        _write(current, spec)
    for member in current.members:
        failed = current.scores[member.id] is None
        board.on_event("error" if failed else "complete", member.id, {})


def _any_left(current: Population) -> bool:
    return any(score is not None for score in current.scores.values())


def _copy_weights(current: Population, spec: SearchSpec, board: Leaderboard) -> None:
    """Copies the donors' checkpoints. No member trains meanwhile, and no donor gets weights itself,
    so an interrupted copy is repeated from the same files."""
    from pipelines.training import checkpoint_store, checkpoints
    from pipelines.training.run import CHECKPOINTS

    def folder(member: str) -> Path:
        return spec.folder / "trials" / trial.run_name(spec.name, member) / CHECKPOINTS

    def address(member: str) -> str:
        return spec.trial_storage(trial.run_name(spec.name, member))

    for name, donor in current.donors.items():
        member = current.member(name)
        change = member.changes[-1]
        if spec.storage:
            checkpoint_store.fetch_all(address(donor), folder(donor))
        change["checkpoint"] = checkpoints.copy_checkpoints(folder(donor), folder(name))
        if spec.storage:
            checkpoint_store.replace_all(address(name), folder(name))
        board.on_event("exploit", name, {"donor": donor, **_about(member)})


def _train(
    current: Population,
    spec: SearchSpec,
    payload: TrialPayload,
    board: Leaderboard,
    at_once: int,
    first: int,
    until: int,
) -> None:
    """Trains one generation: the members that have no score in it yet."""
    from pipelines.cluster import tasks

    todo = [member for member in current.members if member.id not in current.scores]

    def segments() -> Iterator[Segment]:
        for member in todo:
            board.on_event("start", member.id, _about(member))
            yield Segment(member.id, member.settings, member.changes, first - 1, until)

    results = tasks.map_local_tasks(trial.run_segment, payload, segments(), at_once=at_once)
    for number, result in results:
        member = todo[number]
        if isinstance(result, BaseException):
            result = SegmentResult([], str(result))
        score, reason = _score(result, until)
        for epoch, value in result.curve:
            board.on_event("result", member.id, {"epoch": epoch, "value": value})
        board.on_event("wait", member.id, {"reason": reason})
        current.scores[member.id] = score
        _write(current, spec)


def _write(current: Population, spec: SearchSpec) -> None:
    """Writes the state, on this machine and in the storage, before anything depends on it."""
    population.write(current, spec.folder / FILE)
    search_files.publish(spec.storage, spec.folder, FILE)


def _score(result: SegmentResult, until: int) -> tuple[float | None, str]:
    """The metric after the generation's last epoch, or the reason why there is none."""
    if result.reason:
        return None, result.reason
    curve = dict(result.curve)
    # A training that stopped early has no value for the last epoch: its own last one counts.
    value = curve.get(until, curve[max(curve)] if curve else None)
    if value is None or not math.isfinite(value):
        return None, "the metric is not finite"
    return float(value), ""


def _about(member: Member) -> dict[str, Any]:
    return {"id": member.id, "settings": member.settings, "changes": member.changes}
