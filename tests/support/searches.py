"""Shared by the tests of searches: settings, spaces, and readers of what a search wrote."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipelines.workflows import search_board, services
from pipelines.workflows.context import Context

EPOCHS = 4
SETTINGS = [
    *("--variant", "tiny"),
    *("--set", f"train.epochs={EPOCHS}"),
    *("--set", "train.batch_size=96"),
    *("--set", "train.precision=fp32"),
]
TWO_AT_ONCE = ["--set", "workers.cpus=2"]
"""Two trials at a time on four CPUs. Each has a process that loads torch and MLflow."""


def write_space(tmp_path: Path, **space: Any) -> str:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({name.replace("__", "."): v for name, v in space.items()}))
    return str(path)


def runs_of(name: str) -> tuple[Any, list[Any]]:
    """MLflow's run of a search, and those of its trials."""
    context = Context.from_environment()
    parent = services.attach_tracker(context, search_board.find(context, name).parent)
    client = parent._client
    children = client.search_runs(
        [parent.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    return client.get_run(parent.run_id), children


def check_runs(name: str, count: int) -> list[Any]:
    """One run for the search and one for each trial, all ended, each with what was sampled."""
    parent, children = runs_of(name)
    assert parent.info.status == "FINISHED"
    standing = {t["id"]: t for t in json.loads((folder_of(name) / "trials.json").read_text())}
    assert len(standing) == count
    assert sorted(c.data.tags["tessera.trial"] for c in children) == sorted(standing)
    for child in children:
        trial = standing[child.data.tags["tessera.trial"]]
        assert child.data.tags["tessera.trial.status"] == trial["status"]
        failed = trial["status"] == "failed"
        assert child.info.status == ("FAILED" if failed else "FINISHED")
        # Params are those of the first epoch: a member of a population may change them later.
        changes = trial.get("changes") or [trial]
        for path, value in changes[0]["settings"].items():
            assert json.loads(child.data.params[path]) == value
    return list(standing.values())


def start(words: list[str], cluster: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a search in a new process. It has its own Ray cluster, which ends with it, or uses the
    one that `cluster` names."""
    token = ("RAY_AUTH_TOKEN_PATH",) if cluster else ()
    clean = {k: v for k, v in os.environ.items() if k in token or not k.startswith("RAY_")}
    environment = {**clean, **(cluster or {}), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)


def wait_for(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert process.poll() is None, "the search ended early"
        assert time.monotonic() < deadline, "the search did not reach this point in time"
        time.sleep(0.2)


def folder_of(name: str) -> Path:
    return Context.from_environment().searches_dir / name
