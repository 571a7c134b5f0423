"""The fault benchmark counts cases that hang, die, are wrong or fail, and a small run passes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.e2e

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("faults", BENCHMARKS / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "faults", module)  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "outcome"), [("die", "died"), ("lie", "wrong"), ("fail", "other"), ("hang", "hung")]
)
def test_bad_outcomes_are_counted(faults: ModuleType, kind: str, outcome: str) -> None:
    """After a process that died, a new one continues with the next case."""
    count = 2 if kind == "die" else 1
    outcomes = faults.run(kind, count, timeout=5.0 if kind == "hang" else 100.0)
    assert outcomes.counts == {outcome: count}
    assert len(outcomes.bad) == count
    assert outcome in outcomes.bad[0]


@pytest.mark.slow
def test_a_small_run_has_no_bad_outcome(tmp_path: Path) -> None:
    program = [sys.executable, str(BENCHMARKS / "faults.py"), "--cases", "12"]
    kinds = ["shards, detection", "JPEG files"]
    options = ["--results", str(tmp_path), "--only", *kinds]
    done = subprocess.run([*program, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entry = json.loads((tmp_path / "faults.json").read_text())
    assert entry["injected"] == 12 * len(kinds) == sum(entry["all"].values())
    assert entry["kinds"][kinds[0]]["refused"] > 12 / 2
    assert not entry["bad"]
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:3]] == kinds
