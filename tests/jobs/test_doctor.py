"""`doctor` with a real Ray worker, and its messages for each problem."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import doctor

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


@pytest.mark.slow
def test_all_is_well_here(tmp_path: Path) -> None:
    process = run(tmp_path, "--json")
    findings = {f["check"]: f for f in json.loads(process.stdout)}
    assert process.returncode == 0, process.stdout + process.stderr
    assert not [f for f in findings.values() if f["state"] == "fail"]
    assert {
        "python",
        *doctor.LIBRARIES,
        "disk",
        "shared memory",
        "mlflow store",
        "ray",
        "worker's versions",
        "gpu",
        "worker to mlflow",
        "worker's storage",
        "worker's clock",
    } == set(findings)
    assert list((tmp_path / "runs").iterdir()) == []  # its files are gone
    assert "a local Ray" in findings["ray"]["detail"]


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


def test_an_unreachable_mlflow_is_reported_with_a_hint() -> None:
    (finding,) = doctor.check_tracking("http://127.0.0.1:9")
    assert finding.state == "fail"
    assert "nothing listens there" in finding.detail
    assert "MLFLOW_TRACKING_URI" in finding.hint


@pytest.mark.parametrize(
    ("changes", "seen", "check", "state"),
    [
        ({}, True, None, "ok"),
        ({"versions": {"ray": "1.0"}}, True, "worker's versions", "fail"),
        ({"versions": {"ray": ""}}, True, "worker's versions", "fail"),
        ({"gpus": 2}, True, "gpu", "warn"),
        ({"mlflow_problem": "away"}, True, "worker to mlflow", "fail"),
        ({"storage_problem": "read-only"}, True, "worker's storage", "fail"),
        ({}, False, "worker's storage", "fail"),
        ({"ahead_seconds": -61.0}, True, "worker's clock", "warn"),
    ],
)
def test_a_worker_s_report_becomes_findings(
    changes: dict[str, Any], seen: bool, check: str | None, state: str
) -> None:
    report = {
        "versions": {"ray": importlib.metadata.version("ray")},
        "devices": [],
        "gpus": 0,
        "mlflow_problem": "",
        "storage_problem": "",
        "ahead_seconds": 0.0,
    }
    wrong = {
        f.check: f
        for f in doctor.judge({**report, **changes}, seen, Path("runs"))
        if f.state != "ok"
    }
    assert set(wrong) == ({check} if check else set())
    if check:
        assert wrong[check].state == state
        assert wrong[check].hint


def test_the_checks_on_a_worker_name_each_problem(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    probe = {
        "libraries": ["click", "no-such-library"],
        "ours": str(ours),
        "theirs": str(tmp_path / "theirs"),
        "mark": "m",
        "tracking": "http://127.0.0.1:9",
    }
    facts = doctor.check_here(probe)
    assert facts["versions"] == {
        "click": importlib.metadata.version("click"),
        "no-such-library": "",
    }
    assert facts["storage_problem"] == f"{ours}: No such file or directory"
    assert facts["mlflow_problem"]
    ours.write_text("other")
    assert doctor.check_here(probe)["storage_problem"] == "the file has another content there"


def test_a_full_disk_and_an_unsupported_library_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_disk(tmp_path / "not" / "there").state == "ok"
    monkeypatch.setattr(doctor, "FREE_DISK_WARN_BYTES", 2**62)
    assert doctor.check_disk(tmp_path / "not" / "there").state == "warn"
    monkeypatch.setattr(doctor, "FREE_DISK_FAIL_BYTES", 2**61)
    assert doctor.check_disk(tmp_path / "not" / "there").state == "fail"
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1" if name == "ray" else real(name)
    )
    states = {f.check: f.state for f in doctor.check_versions()}
    assert states.pop("ray") == "fail"
    assert set(states.values()) == {"ok"}
