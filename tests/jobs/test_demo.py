"""`make demo` as a person runs it, but for the installation: once, and once more.

The second makes version 2 with the same weights, bit for bit, compares it with the champion, and says
what it decided.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ACCURACY = 0.97
LIMIT_SECONDS = 600


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    services = ("RAY_", "MLFLOW_", "TESSERA_", "PYTEST")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(services)}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.demo", *arguments],
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
def test_the_demo_twice(tmp_path: Path) -> None:
    first = json.loads(demo(tmp_path, "--json").stdout)
    assert first["family"] == "cnn"
    assert first["test accuracy"] >= ACCURACY
    assert first["model version"] == "digits/1"
    assert first["aliases"] == "challenger, champion"
    assert first["champion"] == "version 1"
    assert first["images/s"] > 0
    assert first["run"].endswith("?workflowType=machine_learning")
    assert re.fullmatch(r"(9|10) of 10 right, asked in a fresh process", first["unseen images"])

    second = demo(tmp_path)
    table = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in second.stdout.splitlines()[1:-2])
    assert table["model version"] == "digits/2"
    assert float(table["test accuracy"]) == first["test accuracy"], "the same seed, another result"
    assert table["champion"] == "version 1"
    assert "version 2 not promoted: lead in accuracy; McNemar's test" in second.stderr
    runs = sorted((tmp_path / ".tessera/runs").iterdir())
    newest = [sorted(run.glob("checkpoints/step-*"))[-1] / "weights.safetensors" for run in runs]
    one, other = map(load_file, newest)
    assert all(torch.equal(one[key], other[key]) for key in one | other)
    assert second.stdout.splitlines()[-1] == "open the pages with: tessera up"
    assert [path.name for path in tmp_path.iterdir()] == [".tessera"]
