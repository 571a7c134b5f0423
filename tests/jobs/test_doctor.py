"""`doctor` with a real Ray, its table, and a Ray that never answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs import doctor
from pipelines.workflows.doctor import LIBRARIES, MACHINE_CHECKS, Finding

ROOT = Path(__file__).parents[2]
NAMES = ("RAY_", "MLFLOW_", "TESSERA_")


def run(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(NAMES)}
    return subprocess.run(
        [sys.executable, "-m", "jobs.doctor", *arguments],
        env={**clean, "TESSERA_HOME": str(home), "OMP_NUM_THREADS": "1", **more},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.e2e
@pytest.mark.slow
def test_all_is_well_here(tmp_path: Path, digits: Path) -> None:
    process = run(tmp_path, "--json", "--data", str(digits))
    findings = json.loads(process.stdout)
    assert process.returncode == 0, process.stdout + process.stderr
    assert not [f for f in findings if f["state"] == "fail"]
    ours = {f["check"]: f for f in findings if not f["machine"]}
    assert set(ours) == {"python", *LIBRARIES, "mlflow store", "private files", "ray"}
    assert "a local Ray" in ours["ray"]["detail"]
    machines = [f for f in findings if f["machine"]]
    assert len({f["machine"] for f in machines}) == 1
    assert {f["check"] for f in machines} == set(MACHINE_CHECKS)
    assert list((tmp_path / "runs").iterdir()) == []  # its files are gone


@pytest.mark.slow
def test_a_ray_that_never_responds_is_reported_after_the_time_limit(tmp_path: Path) -> None:
    before = {p.pid for p in psutil.process_iter()}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        process = run(tmp_path, "--timeout", "4", RAY_ADDRESS=address)
        took = time.monotonic() - began
    assert process.returncode == 1
    assert f"{address}: no response in 4 s" in process.stdout
    assert took < 30
    left = [p for p in psutil.process_iter() if p.pid not in before and _home(p) == str(tmp_path)]
    assert left == []


def _home(process: psutil.Process) -> str:
    try:
        return str(process.environ().get("TESSERA_HOME", ""))
    except psutil.Error:
        return ""


def test_the_table_has_a_row_for_each_machine(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show_machines(
        [
            Finding("disk", "ok", "20 GiB free", machine="head"),
            Finding("storage", "fail", "sees no files of b", "share it", "head"),
            Finding("disk", "ok", "8 GiB free", machine="b"),
            Finding("storage", "fail", "sees no files of head", "share it", "b"),
            Finding("ray", "fail", "gave no answer", "look", "c"),
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "",
        "machine  ray   disk         storage",
        "head           20 GiB free  fail",
        "b              8 GiB free   fail",
        "c        fail",
        "",
        "fail  head: storage: sees no files of b",
        "fail  b: storage: sees no files of head",
        "      → share it",
        "fail  c: ray: gave no answer",
        "      → look",
    ]
