"""Who is champion: of two decisions one wins, and a death at any step leaves a champion."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_server import wire_to

from models.core.errors import TesseraError
from pipelines.interfaces import Decision, Registry, Version
from pipelines.promotion import champions
from pipelines.promotion.champions import ConcurrentPromotionError
from pipelines.tracking import mlflow_runs
from pipelines.tracking.memory import MemoryRegistry
from pipelines.tracking.mlflow_registry import MlflowRegistry

pytestmark = pytest.mark.usefixtures("mlflow_settings")


@pytest.fixture(params=["memory", "sqlite", "http"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[], Registry], str]:
    """How to open a registry, again and again, and the run that its models come from."""
    if request.param == "memory":
        one = MemoryRegistry(tmp_path / "memory")
        return lambda: one, "run"
    if request.param == "sqlite":
        root = request.getfixturevalue("store")
        uri, artifacts = mlflow_runs.embedded_uri(root), mlflow_runs.embedded_artifacts(root)
    else:
        uri, artifacts = request.getfixturevalue("mlflow_server").uri, None
    run = mlflow_runs.open_run(
        uri, experiment="e", name=request.node.name, tags={}, artifact_root=artifacts
    )
    return lambda: MlflowRegistry(uri), run.run_id


def versions(registry: Registry, run_id: str, folder: Path, name: str, count: int) -> list[Version]:
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text("content")
    return [registry.register(name, folder, run_id=run_id, tags={}) for _ in range(count)]


def number(registry: Registry, name: str) -> int | None:
    held = champions.current_champion(registry, name)
    return held.number if held else None


def test_one_after_the_other_and_back(
    opened: tuple[Callable[[], Registry], str], tmp_path: Path
) -> None:
    registry = opened[0]()
    first, second, third = versions(registry, opened[1], tmp_path / "f", "m1", 3)
    assert champions.read_state(registry, "m1") == champions.ChampionState(None, 0)
    for version in (first, second, third):
        champions.move(
            registry, "m1", champions.read_state(registry, "m1"), version, kind="promotion"
        )
        assert number(registry, "m1") == version.number
    assert champions.predecessor(registry, "m1", 3) == 2
    champions.move(registry, "m1", champions.read_state(registry, "m1"), second, kind="rollback")
    assert number(registry, "m1") == 2
    assert champions.predecessor(registry, "m1", 2) == 1, "a rollback is no promotion"
    assert champions.predecessor(registry, "m1", 1) is None
    assert [d.kind for d in registry.decisions("m1")] == ["promotion"] * 3 + ["rollback"]
    assert all(decision.done for decision in registry.decisions("m1"))
    assert registry.names() == ["m1"], "the record is no model"


def test_what_was_compared_with_another_champion_is_told(
    opened: tuple[Callable[[], Registry], str], tmp_path: Path
) -> None:
    registry = opened[0]()
    first, second = versions(registry, opened[1], tmp_path / "f", "m2", 2)
    seat = champions.read_state(registry, "m2")
    champions.move(registry, "m2", seat, first, kind="promotion")
    with pytest.raises(ConcurrentPromotionError, match="it is version 1"):
        champions.move(registry, "m2", seat, second, kind="promotion")
    assert number(registry, "m2") == 1


def test_an_alias_that_was_moved_by_hand_is_seen(
    opened: tuple[Callable[[], Registry], str], tmp_path: Path
) -> None:
    registry = opened[0]()
    first, second, third = versions(registry, opened[1], tmp_path / "f", "m3", 3)
    champions.move(registry, "m3", champions.read_state(registry, "m3"), first, kind="promotion")
    seat = champions.read_state(registry, "m3")
    registry.alias("m3", "champion", 3)
    with pytest.raises(ConcurrentPromotionError, match="it is version 3"):
        champions.move(registry, "m3", seat, second, kind="promotion")
    seat = champions.read_state(registry, "m3")
    assert seat.champion is not None
    assert seat.champion.number == third.number, "whoever moved it meant it"
    champions.move(registry, "m3", seat, second, kind="promotion")
    assert number(registry, "m3") == 2


class Death(BaseException):
    pass


@pytest.mark.parametrize("dies_at", range(4))
def test_a_death_between_two_steps_leaves_a_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Before the first write, and after each one."""
    registry = MemoryRegistry(tmp_path / "memory")
    first, second = versions(registry, "run", tmp_path / "f", "m", 2)
    champions.move(registry, "m", champions.read_state(registry, "m"), first, kind="promotion")
    seat, written = champions.read_state(registry, "m"), 0

    def dying(name: str) -> None:
        real = getattr(registry, name)

        def call(*given: Any) -> Any:
            nonlocal written
            if written == dies_at:
                raise Death
            written += 1
            return real(*given)

        monkeypatch.setattr(registry, name, call)

    for name in ("decide", "alias", "done"):
        dying(name)
    try:
        champions.move(registry, "m", seat, second, kind="promotion")
        assert dies_at == 3
    except Death:
        assert dies_at < 3
    monkeypatch.undo()
    assert number(registry, "m") == (1 if dies_at < 2 else 2)
    seat = champions.read_state(registry, "m")  # whoever comes next finishes it
    assert seat.champion is not None
    assert seat.champion.number == (1 if dies_at == 0 else 2)
    assert all(decision.done for decision in registry.decisions("m"))
    if dies_at == 0:
        champions.move(registry, "m", seat, second, kind="promotion")
    assert number(registry, "m") == 2


@pytest.mark.control(49)
def test_a_death_without_the_record_is_finished_by_nobody(tmp_path: Path) -> None:
    """The verdict is written, the alias isn't moved yet: nothing says that it was to be."""
    registry = MemoryRegistry(tmp_path / "memory")
    first, second = versions(registry, "run", tmp_path / "f", "m", 2)
    registry.alias("m", "champion", first.number)
    registry.tag(second, {"tessera.verdict": "promoted"})
    seat = champions.read_state(registry, "m")
    assert seat.champion is not None
    assert seat.champion.number == first.number


def test_a_decision_whose_version_was_deleted_stops_nobody(tmp_path: Path) -> None:
    registry = MemoryRegistry(tmp_path / "memory")
    first, second, third = versions(registry, "run", tmp_path / "f", "m", 3)
    champions.move(registry, "m", champions.read_state(registry, "m"), first, kind="promotion")
    registry.decide("m", Decision(0, 1, 2, 1, "promotion", "token"))
    registry.delete(second)
    seat = champions.read_state(registry, "m")
    assert seat == champions.ChampionState(registry.version("m", 1), 2)
    champions.move(registry, "m", seat, third, kind="promotion")
    assert number(registry, "m") == 3


def test_who_comes_late_doesnt_undo_what_was_decided_since(tmp_path: Path) -> None:
    """Its maker sleeps after its decision, others finish it and decide on: then it wakes."""
    registry = MemoryRegistry(tmp_path / "memory")
    first, _, third = versions(registry, "run", tmp_path / "f", "m", 3)
    champions.move(registry, "m", champions.read_state(registry, "m"), first, kind="promotion")
    registry.decide("m", Decision(0, 1, 2, 1, "promotion", "sleeper"))
    champions.move(registry, "m", champions.read_state(registry, "m"), third, kind="promotion")
    sleeper = next(d for d in registry.decisions("m") if d.token == "sleeper")
    champions._finish(registry, "m", sleeper)
    assert number(registry, "m") == 3


def race(registries: list[Registry], name: str, rivals: list[Version], round_: int) -> None:
    """Two promotions at once: one wins, the other is told, nothing else happens."""
    seat = champions.read_state(registries[0], name)
    gate, told = threading.Barrier(2), []

    def run(registry: Registry, version: Version) -> None:
        gate.wait()
        try:
            champions.move(registry, name, seat, version, kind="promotion")
            told.append((version.number, None))
        except BaseException as error:
            told.append((version.number, error))

    threads = [threading.Thread(target=run, args=both) for both in zip(registries, rivals)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, error in told if error is None]
    others = [error for _, error in told if error is not None]
    assert len(winners) == 1, f"round {round_}: {told}"
    assert all(isinstance(error, ConcurrentPromotionError) for error in others), (
        f"round {round_}: {told}"
    )
    assert number(registries[0], name) == winners[0], f"round {round_}"


def test_two_at_once(opened: tuple[Callable[[], Registry], str], tmp_path: Path) -> None:
    open_one, run_id = opened
    rivals = versions(open_one(), run_id, tmp_path / "f", "raced", 2)
    for round_ in range(3):  # the first alias ever is one of them
        race([open_one(), open_one()], "raced", rivals, round_)


@pytest.mark.control(47)
def test_two_at_once_without_the_record_both_win(tmp_path: Path) -> None:
    """The control: what a registry's alias alone makes of it."""
    registry = MemoryRegistry(tmp_path / "memory")
    versions(registry, "run", tmp_path / "f", "m", 3)
    registry.alias("m", "champion", 1)
    told = []
    for candidate in (2, 3):  # both were compared with version 1
        registry.alias("m", "champion", candidate)
        told.append(candidate)
    assert told == [2, 3]
    assert number(registry, "m") == 3


@pytest.mark.slow
@pytest.mark.fault(47)
def test_two_promotions_at_once_a_hundred_times(
    mlflow_server: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = mlflow_runs.open_run(
        mlflow_server.uri, experiment="e", name=request.node.name, tags={}, artifact_root=None
    )

    registries: list[Registry] = [MlflowRegistry(mlflow_server.uri) for _ in range(2)]
    for name in (f"raced-{number}" for number in range(10)):
        rivals = versions(registries[0], run.run_id, tmp_path / "f", name, 2)
        for round_ in range(10):
            race(registries, name, rivals, round_)
        assert len(champions.effective(registries[0].decisions(name))) == 10


@pytest.mark.slow
def test_a_wire_that_breaks_all_the_time_is_waited_for(
    mlflow_server: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each second connection is refused or gets an error, and those that are open are cut."""
    run = mlflow_runs.open_run(
        mlflow_server.uri, experiment="e", name=request.node.name, tags={}, artifact_root=None
    )
    sound = MlflowRegistry(mlflow_server.uri)
    rivals = versions(sound, run.run_id, tmp_path / "f", "wired", 2)
    with wire_to(mlflow_server.port) as wire:
        registry = MlflowRegistry(wire.address)
        wire.faults = ["503", "", "refuse", ""] * 500
        ended = threading.Event()

        def cut() -> None:
            while not ended.wait(0.2):
                wire.cut()

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            for version in rivals * 2:
                seat = champions.read_state(registry, "wired")
                champions.move(registry, "wired", seat, version, kind="promotion")
                assert number(sound, "wired") == version.number
        finally:
            ended.set()
            cutter.join()
        assert len(wire.faults) < 1995, "the wire didn't break"
    assert len(champions.effective(sound.decisions("wired"))) == 4


def test_a_deleted_version_is_gone(
    opened: tuple[Callable[[], Registry], str], tmp_path: Path
) -> None:
    registry = opened[0]()
    first, _ = versions(registry, opened[1], tmp_path / "f", "m4", 2)
    registry.delete(first)
    assert [version.number for version in registry.versions("m4")] == [2]
    with pytest.raises(TesseraError, match="no version"):
        registry.version("m4", 1)
    (third,) = versions(registry, opened[1], tmp_path / "f", "m4", 1)
    assert third.number == 3, "a number isn't given twice"
