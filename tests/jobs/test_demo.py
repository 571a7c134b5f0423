"""`tessera demo` as `make demo` runs it, on the cluster of the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_runner import Call

pytestmark = pytest.mark.e2e

ACCURACY = 0.97


@pytest.mark.slow
def test_the_demo_runs(
    ray_cluster: None, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TESSERA_HOME", raising=False)
    done = call("demo")
    assert done.status == 0, done.err
    assert "Traceback" not in done.err
    shown = done.out.splitlines()
    first = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in shown[1:-2])
    assert first["family"] == "cnn"
    assert float(first["test accuracy"]) >= ACCURACY
    assert first["model version"] == "digits/1"
    assert first["aliases"] == "challenger, champion"
    assert first["champion"] == "version 1"
    assert float(first["images/s"]) > 0
    assert "?workflowType=machine_learning" in first["run"]
    assert first["run"].endswith("(once `tessera up` runs)")
    assert re.fullmatch(r"(9|10) of 10 right, in a fresh process", first["unseen images"])
    assert shown[-1] == "open the pages with: tessera up"
    assert [path.name for path in tmp_path.iterdir()] == [".tessera"]
