"""The tracker and the registry in memory, where the contract tests with MLflow don't reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.interfaces import Point
from pipelines.tracking.memory import MemoryRegistry, MemoryTracker


def test_the_same_point_twice_is_one() -> None:
    tracker = MemoryTracker()
    point = Point(step=1, time_ms=5, values={"loss": 0.5})
    tracker.metrics([point])
    tracker.metrics([point, Point(step=1, time_ms=6, values={"loss": 0.5})])
    assert tracker.points == {("loss", 1): [(5, 0.5), (6, 0.5)]}


def test_a_param_keeps_its_first_value() -> None:
    tracker = MemoryTracker()
    tracker.params({"lr": "0.1"})
    tracker.params({"lr": "0.1"})
    with pytest.raises(TesseraError, match="'lr' was logged before"):
        tracker.params({"lr": "0.2"})


def test_a_deleted_version_takes_its_aliases_along(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    registry = MemoryRegistry(tmp_path / "registry")
    for _ in range(2):
        registry.register("m", files, run_id="r", tags={})
    registry.alias("m", "champion", 1)
    assert registry.version("m", "champion").number == 1
    registry.delete(registry.version("m", 1))
    assert [version.number for version in registry.versions("m")] == [2]
    with pytest.raises(TesseraError, match="no version or alias 'champion'"):
        registry.version("m", "champion")
