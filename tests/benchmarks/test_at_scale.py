"""The plan for many machines: traffic, the best checkpoint interval, and the table of the docs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEASURED = BENCHMARKS.parent / "docs" / "reference" / "measured.md"


@pytest.fixture
def at_scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import importlib

    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("at_scale")


def test_docs_contain_the_tables(at_scale: ModuleType) -> None:
    entry = json.loads((BENCHMARKS / "results" / "at_scale.json").read_text())
    assert at_scale.Plan(**entry["plan"]) == at_scale.Plan()
    assert at_scale.markdown(entry) in MEASURED.read_text()


def test_one_machine_reads_every_shard_once(at_scale: ModuleType) -> None:
    plan = at_scale.Plan(shards=64, samples=100)
    assert at_scale.traffic(plan, 1)["readers_per_shard"] == 1.0


def test_small_shards_are_read_by_fewer_machines(at_scale: ModuleType) -> None:
    plan = at_scale.Plan(shards=400, samples=1000, batch=8)
    small = replace(plan, shards=12_500, samples=32)
    assert at_scale.traffic(plan, 64)["readers_per_shard"] > 4
    assert at_scale.traffic(small, 64)["readers_per_shard"] < 1.1


def test_nothing_is_lost_without_failures_and_checkpoints(at_scale: ModuleType) -> None:
    plan = at_scale.Plan(gpu_hours=1e15, blocked_seconds=0.0, days=1.0)
    assert at_scale.simulate(plan, 600.0, np.random.default_rng(0))["lost"] == 0.0


def test_the_shares_add_up(at_scale: ModuleType) -> None:
    one = at_scale.simulate(at_scale.Plan(days=5.0), 600.0, np.random.default_rng(0))
    assert one["failures"] > 5
    assert one["again"] + one["blocked"] + one["restarting"] == pytest.approx(one["lost"])


def test_the_simulation_confirms_dalys_interval(at_scale: ModuleType) -> None:
    plan = at_scale.Plan(days=10.0)
    best = at_scale.daly_seconds(plan)
    assert best == pytest.approx(at_scale.young_seconds(plan), rel=0.05)
    lost = {share: at_scale.simulated(plan, best * share, 20)["lost"] for share in (0.25, 1, 4)}
    assert lost[1] < lost[0.25]
    assert lost[1] < lost[4]
