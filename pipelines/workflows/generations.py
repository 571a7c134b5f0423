"""A population's generations: all members train for some epochs, then the worst take the weights of
the best and go on with settings near theirs.

In: what was asked for, and where it is heard what becomes of the members. Out: trials that are
trained to their end. Tune's own scheduler isn't used: its state is lost when a driver is killed,
members that don't run in step go back in their own record, and settings may leave the space.
`population.json` has everything here, and nothing in it is executed when it is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipelines.search import population
from pipelines.search.population import Member, Population
from pipelines.workflows import trial

if TYPE_CHECKING:
    from models.core.family import Metric
    from pipelines.workflows.search_board import Leaderboard, SearchSpec

FILE = "population.json"


def run(
    spec: SearchSpec,
    metric: Metric,
    most_epochs: int,
    told: dict[str, Any],
    board: Leaderboard,
    at_once: int,
) -> None:
    """All generations, from where they are. After `budget_seconds` no other begins."""
    deadline = time.monotonic() + (spec.budget_seconds or float("inf"))
    file = spec.folder / FILE
    people = population.read(file)
    if people is None:
        people = population.begin(spec.parsed_space(), spec.trials, spec.seed)
        population.write(people, file)
    while True:
        until = min((people.generation + 1) * spec.interval_epochs, most_epochs)
        first = people.generation * spec.interval_epochs + 1
        if not people.ready:
            _hand_over(people, spec, board)
            people.ready = True
            population.write(people, file)
        _train(people, spec, told, board, at_once, first, until)
        if until >= most_epochs or not _any_left(people) or time.monotonic() > deadline:
            break
        population.advance(
            people,
            spec.parsed_space(),
            direction=metric.direction,
            seed=spec.seed,
            epoch=until + 1,
        )
        population.write(people, file)
    for member in people.members:
        failed = people.scores[member.id] is None
        board.on_event("error" if failed else "complete", member.id, {})


def _any_left(people: Population) -> bool:
    return any(score is not None for score in people.scores.values())


def _hand_over(people: Population, spec: SearchSpec, board: Leaderboard) -> None:
    """Copies the donors' checkpoints. No member trains meanwhile, and no donor is given weights
    itself: what was cut off is done again from the same files."""
    from pipelines.training import checkpoints
    from pipelines.training.run import CHECKPOINTS

    def folder(member: str) -> Any:
        return spec.folder / "trials" / trial.run_name(spec.name, member) / CHECKPOINTS

    for name, donor in people.donors.items():
        member = people.member(name)
        change = member.changes[-1]
        change["checkpoint"] = checkpoints.adopt(folder(donor), folder(name))
        board.on_event("exploit", name, {"donor": donor, **_about(member)})


def _train(
    people: Population,
    spec: SearchSpec,
    told: dict[str, Any],
    board: Leaderboard,
    at_once: int,
    first: int,
    until: int,
) -> None:
    """One generation, but for the members that are through with it."""
    from pipelines.cluster import tasks

    todo = [member for member in people.members if member.id not in people.scores]

    def parts() -> Iterator[dict[str, Any]]:
        for member in todo:
            board.on_event("start", member.id, _about(member))
            yield {**_about(member), "from_epoch": first - 1, "until_epoch": until}

    for number, found in tasks.map_local_tasks(trial.run_segment, told, parts(), at_once=at_once):
        member = todo[number]
        if isinstance(found, BaseException):
            found = {"curve": [], "reason": str(found)}
        score, reason = _score(found, until)
        for epoch, value in found["curve"]:
            board.on_event("result", member.id, {"epoch": epoch, "value": value})
        board.on_event("wait", member.id, {"reason": reason})
        people.scores[member.id] = score
        population.write(people, spec.folder / FILE)


def _score(found: Mapping[str, Any], until: int) -> tuple[float | None, str]:
    """The figure after the generation's last epoch, or why there is none."""
    import math

    if found["reason"]:
        return None, found["reason"]
    curve = dict(found["curve"])
    value = curve.get(until, curve[max(curve)] if curve else None)  # it may have stopped early
    if value is None or not math.isfinite(value):
        return None, "the figure is not finite"
    return float(value), ""


def _about(member: Member) -> dict[str, Any]:
    return {"id": member.id, "settings": member.settings, "changes": member.changes}
