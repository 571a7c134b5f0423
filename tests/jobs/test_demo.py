"""`make demo` as a user runs it, without the installation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ACCURACY = 0.97
LIMIT_SECONDS = 600


def call(folder: Path, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    services = ("RAY_", "MLFLOW_", "TESSERA_", "PYTEST")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(services)}
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{verb}", *arguments],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    shown = call(tmp_path, "demo").stdout.splitlines()
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
