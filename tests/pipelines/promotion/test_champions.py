"""The champion: one of two concurrent decisions wins, and after a crash at any step there is a
champion."""

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
from pipelines.tracking import mlflow_runs, mlflow_store
from pipelines.tracking.memory import MemoryRegistry
from pipelines.tracking.mlflow_registry import MlflowRegistry

pytestmark = pytest.mark.usefixtures("mlflow_settings")


SLOW = pytest.mark.slow


@pytest.fixture(params=["memory", *(pytest.param(p, marks=SLOW) for p in ("sqlite", "http"))])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[], Registry], str]:
    """A function that opens the registry, and the run that its models come from."""
    if request.param == "memory":
        one = MemoryRegistry(tmp_path / "memory")
        return lambda: one, "run"
    if request.param == "sqlite":
        root = request.getfixturevalue("store")
        uri, artifacts = mlflow_store.embedded_uri(root), mlflow_store.embedded_artifacts(root)
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
    champion = champions.current_champion(registry, name)
    return champion.number if champion else None


@pytest.mark.slow
def test_promotions_and_a_rollback(
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
    assert champions.predecessor(registry, "m1", 2) == 1, "a rollback doesn't count as a promotion"
    assert champions.predecessor(registry, "m1", 1) is None
    assert [d.kind for d in registry.decisions("m1")] == ["promotion"] * 3 + ["rollback"]
    assert all(decision.done for decision in registry.decisions("m1"))
    assert "m1" in registry.names()
    assert "m1.champions" not in registry.names(), "the record must not be listed as a model"


def test_a_promotion_against_a_former_champion_fails(
    opened: tuple[Callable[[], Registry], str], tmp_path: Path
) -> None:
    registry = opened[0]()
    first, second = versions(registry, opened[1], tmp_path / "f", "m2", 2)
    state = champions.read_state(registry, "m2")
    champions.move(registry, "m2", state, first, kind="promotion")
    with pytest.raises(ConcurrentPromotionError, match="it is version 1"):
        champions.move(registry, "m2", state, second, kind="promotion")
    assert number(registry, "m2") == 1


def test_an_alias_moved_by_hand_is_respected(
    opened: tuple[Callable[[], Registry], str], tmp_path: Path
) -> None:
    registry = opened[0]()
    first, second, third = versions(registry, opened[1], tmp_path / "f", "m3", 3)
    champions.move(registry, "m3", champions.read_state(registry, "m3"), first, kind="promotion")
    state = champions.read_state(registry, "m3")
    registry.alias("m3", "champion", 3)
    with pytest.raises(ConcurrentPromotionError, match="it is version 3"):
        champions.move(registry, "m3", state, second, kind="promotion")
    state = champions.read_state(registry, "m3")
    assert state.champion is not None
    assert state.champion.number == third.number, "the alias moved by hand counts"
    champions.move(registry, "m3", state, second, kind="promotion")
    assert number(registry, "m3") == 2


class Crash(BaseException):
    pass


@pytest.mark.parametrize("crash_at", range(4))
def test_there_is_a_champion_after_a_crash_between_any_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """Crashes before the first write, and after each write."""
    registry = MemoryRegistry(tmp_path / "memory")
    first, second = versions(registry, "run", tmp_path / "f", "m", 2)
    champions.move(registry, "m", champions.read_state(registry, "m"), first, kind="promotion")
    state, written = champions.read_state(registry, "m"), 0

    def crashing(name: str) -> None:
        real = getattr(registry, name)

        def call(*given: Any) -> Any:
            nonlocal written
            if written == crash_at:
                raise Crash
            written += 1
            return real(*given)

        monkeypatch.setattr(registry, name, call)

    for name in ("decide", "alias", "done"):
        crashing(name)
    try:
        champions.move(registry, "m", state, second, kind="promotion")
        assert crash_at == 3
    except Crash:
        assert crash_at < 3
    monkeypatch.undo()
    assert number(registry, "m") == (1 if crash_at < 2 else 2)
    state = champions.read_state(registry, "m")  # the next reader finishes it
    assert state.champion is not None
    assert state.champion.number == (1 if crash_at == 0 else 2)
    assert all(decision.done for decision in registry.decisions("m"))
    if crash_at == 0:
        champions.move(registry, "m", state, second, kind="promotion")
    assert number(registry, "m") == 2


@pytest.mark.control(49)
def test_without_the_record_a_crashed_promotion_is_never_finished(tmp_path: Path) -> None:
    """The verdict is written, the alias isn't moved yet, and nothing records that it should be."""
    registry = MemoryRegistry(tmp_path / "memory")
    first, second = versions(registry, "run", tmp_path / "f", "m", 2)
    registry.alias("m", "champion", first.number)
    registry.tag(second, {"tessera.verdict": "promoted"})
    state = champions.read_state(registry, "m")
    assert state.champion is not None
    assert state.champion.number == first.number


def test_a_decision_for_a_deleted_version_does_not_block_promotions(tmp_path: Path) -> None:
    registry = MemoryRegistry(tmp_path / "memory")
    first, second, third = versions(registry, "run", tmp_path / "f", "m", 3)
    champions.move(registry, "m", champions.read_state(registry, "m"), first, kind="promotion")
    registry.decide("m", Decision(0, 1, 2, 1, "promotion", "token"))
    registry.delete(second)
    state = champions.read_state(registry, "m")
    assert state == champions.ChampionState(registry.version("m", 1), 2)
    champions.move(registry, "m", state, third, kind="promotion")
    assert number(registry, "m") == 3


def test_a_late_client_doesnt_undo_newer_decisions(tmp_path: Path) -> None:
    """A client stalls after its decision. Others finish it and decide again, then it resumes."""
    registry = MemoryRegistry(tmp_path / "memory")
    first, _, third = versions(registry, "run", tmp_path / "f", "m", 3)
    champions.move(registry, "m", champions.read_state(registry, "m"), first, kind="promotion")
    registry.decide("m", Decision(0, 1, 2, 1, "promotion", "sleeper"))
    champions.move(registry, "m", champions.read_state(registry, "m"), third, kind="promotion")
    sleeper = next(d for d in registry.decisions("m") if d.token == "sleeper")
    champions._finish(registry, "m", sleeper)
    assert number(registry, "m") == 3


def race(registries: list[Registry], name: str, rivals: list[Version], round_: int) -> None:
    """Two promotions at once: one succeeds, the other raises, and nothing else changes."""
    state = champions.read_state(registries[0], name)
    gate, outcomes = threading.Barrier(2), []

    def run(registry: Registry, version: Version) -> None:
        gate.wait()
        try:
            champions.move(registry, name, state, version, kind="promotion")
            outcomes.append((version.number, None))
        except BaseException as error:
            outcomes.append((version.number, error))

    threads = [threading.Thread(target=run, args=both) for both in zip(registries, rivals)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, error in outcomes if error is None]
    others = [error for _, error in outcomes if error is not None]
    assert len(winners) == 1, f"round {round_}: {outcomes}"
    assert all(isinstance(error, ConcurrentPromotionError) for error in others), (
        f"round {round_}: {outcomes}"
    )
    assert number(registries[0], name) == winners[0], f"round {round_}"


def test_of_two_concurrent_promotions_one_wins(
    opened: tuple[Callable[[], Registry], str], tmp_path: Path
) -> None:
    open_one, run_id = opened
    rivals = versions(open_one(), run_id, tmp_path / "f", "raced", 2)
    for round_ in range(3):  # the first round sets the first alias
        race([open_one(), open_one()], "raced", rivals, round_)


@pytest.mark.control(47)
def test_without_the_record_two_concurrent_promotions_both_succeed(tmp_path: Path) -> None:
    """Control: with the alias alone."""
    registry = MemoryRegistry(tmp_path / "memory")
    versions(registry, "run", tmp_path / "f", "m", 3)
    registry.alias("m", "champion", 1)
    outcomes = []
    for candidate in (2, 3):  # both were compared with version 1
        registry.alias("m", "champion", candidate)
        outcomes.append(candidate)
    assert outcomes == [2, 3]
    assert number(registry, "m") == 3


@pytest.mark.slow
@pytest.mark.fault(47)
def test_twelve_races_of_two_promotions(
    mlflow_server: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = mlflow_runs.open_run(
        mlflow_server.uri, experiment="e", name=request.node.name, tags={}, artifact_root=None
    )

    registries: list[Registry] = [MlflowRegistry(mlflow_server.uri) for _ in range(2)]
    for name in (f"raced-{number}" for number in range(4)):
        rivals = versions(registries[0], run.run_id, tmp_path / "f", name, 2)
        for round_ in range(3):  # the first round sets the first alias
            race(registries, name, rivals, round_)
        assert len(champions.effective(registries[0].decisions(name))) == 3


@pytest.mark.slow
def test_promotions_succeed_over_a_connection_that_keeps_breaking(
    mlflow_server: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every second connection is refused or returns an error, and open ones are cut."""
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
                state = champions.read_state(registry, "wired")
                champions.move(registry, "wired", state, version, kind="promotion")
                assert number(sound, "wired") == version.number
        finally:
            ended.set()
            cutter.join()
        assert len(wire.faults) < 1995, "the connection didn't break"
    assert len(champions.effective(sound.decisions("wired"))) == 4


def test_a_deleted_version_is_not_listed(
    opened: tuple[Callable[[], Registry], str], tmp_path: Path
) -> None:
    registry = opened[0]()
    first, _ = versions(registry, opened[1], tmp_path / "f", "m4", 2)
    registry.delete(first)
    assert [version.number for version in registry.versions("m4")] == [2]
    with pytest.raises(TesseraError, match="no version"):
        registry.version("m4", 1)
    (third,) = versions(registry, opened[1], tmp_path / "f", "m4", 1)
    assert third.number == 3, "a number must not be used twice"
