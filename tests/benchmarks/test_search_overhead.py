"""The benchmark of a trial's overhead runs, on the cluster of the tests, and counts correctly."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_search_overhead_is_measured_per_trial(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(
        "search_overhead", BENCHMARKS / "search_overhead.py"
    )
    assert spec is not None
    assert spec.loader is not None
    # Not in sys.modules, so that its functions are sent to Ray's processes by value.
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    methods = ["optuna alone", "generations"]
    options = ["--trials", "1", "3", "--rounds", "1", "--only", *methods]
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["search_overhead.py", *options, *folders])
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))  # it sets its own; this restores it
    assert module.main() == 0
    entry = json.loads((tmp_path / "results/search_overhead.json").read_text())
    measured = {(one["method"], one["trials"]): one for one in entry["entries"]}
    assert set(measured) == {(method, n) for method in methods for n in (1, 3)}
    for (_, trials), one in measured.items():
        assert one["seconds_per_trial"] == pytest.approx(one["seconds"] / trials)
    seconds = entry["growth"]["generations"]["seconds_per_further_trial"]
    few, many = measured["generations", 1], measured["generations", 3]
    assert seconds == pytest.approx((many["seconds"] - few["seconds"]) / 2)
    assert not list((tmp_path / "work").iterdir())
