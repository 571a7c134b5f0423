"""Trainings whose files are in a real S3 store: another machine goes on, an outage is survived."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gloo_ranks
import pytest
from faulty_server import wire_to
from mlflow_server import MlflowServer
from s3_server import S3Server
from stored_runs import expire_lease

from pipelines import recipe as recipes
from pipelines.recipe import Recipe
from pipelines.storage.open import open_storage
from pipelines.tracking.events import read_events
from pipelines.training import run as training_run
from pipelines.training import sample_log
from pipelines.training.run_storage import RunStorage
from pipelines.workflows import train
from pipelines.workflows.context import Context

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
COMMAND = (
    sys.executable,
    "-c",
    "import sys; from pipelines.storage import lease; lease.TTL_SECONDS = 6.0; "
    "from jobs import cli, train; cli.run(train.command, 'tessera train')",
)
"""`tessera train` with a lease that others need not wait for so long."""
WORK = ROOT / "tests" / "support" / "rank_work.py"
EPOCHS = 12


def small(digits: Path, **changes: Any) -> Recipe:
    return recipes.start("cnn", "tiny").with_overrides(
        {"data.path": str(digits), "train.epochs": EPOCHS, "workers.count": 0, **changes}
    )


def machine(home: Path, server: MlflowServer, storage: str = "") -> Context:
    """The settings of a machine with its own disk."""
    settings = {"TESSERA_HOME": str(home), "MLFLOW_TRACKING_URI": server.uri}
    return Context.from_environment({**os.environ, **settings, "TESSERA_STORAGE": storage})


def weights(folder: Path) -> bytes:
    return (sorted(folder.glob("checkpoints/step-*"))[-1] / "weights.safetensors").read_bytes()


def history(server: MlflowServer, run_id: str, metric: str) -> list[tuple[int, float]]:
    import mlflow

    found = mlflow.MlflowClient(server.uri).get_metric_history(run_id, metric)
    return sorted((point.step, point.value) for point in found)


@pytest.mark.fault(35)
def test_another_machine_goes_on_when_the_drivers_is_lost(
    digits: Path, s3: str, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    recipe = small(digits, **{"data.sample_log": True, "checkpoint.every_steps": 5})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_json())
    environment = {
        **os.environ,
        "TESSERA_HOME": str(tmp_path / "lost"),
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
    }
    command = [*COMMAND, str(file), "--storage", s3, "--json"]
    training = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    storage = open_storage(s3)
    deadline = time.monotonic() + 120
    while not any("step-000000029/manifest" in n or "/step-00000003" in n for n in storage.names()):
        assert time.monotonic() < deadline
        assert training.poll() is None
        time.sleep(0.1)
    os.killpg(training.pid, 9)
    training.wait()
    shutil.rmtree(tmp_path / "lost")

    (name,) = storage.folders("runs")
    expire_lease(storage, f"runs/{name}")
    there = machine(tmp_path / "there", mlflow_server, s3)
    before = training_run.find(there.runs_dir, name, there.remote_storage)
    outcome = train.resume(name, progress=False, context=there)
    assert outcome.run.run_id == before.run_id != ""
    kinds = {event["kind"] for event, _ in read_events(outcome.run.event_log)}
    assert "resume" in kinds

    plain = train.train(recipe, progress=False, context=machine(tmp_path / "plain", mlflow_server))
    assert weights(outcome.run.folder) == weights(plain.run.folder)
    for metric in ("val/accuracy", "train/loss"):
        points = history(mlflow_server, before.run_id, metric)
        assert points == history(mlflow_server, plain.run.run_id, metric)
        assert len({step for step, _ in points}) == len(points)
    used = sample_log.read(outcome.run.folder)
    assert used == sample_log.read(plain.run.folder)


def test_ranks_on_machines_that_share_nothing_train_and_resume(
    digits: Path, s3: str, tmp_path: Path
) -> None:
    recipe = small(digits, **{"train.epochs": 4, "data.sample_log": True})

    def run(home: str, storage: str, **more: Any) -> Path:
        payload = {"recipe": recipe.to_json(), "home": str(tmp_path / home), "storage": storage}
        for result in gloo_ranks.run(WORK, "train_apart", 2, {**payload, **more}):
            assert "error" not in result, result
        return tmp_path / home

    plain = run("plain", "")
    first = run("first", s3, until_epoch=2)
    assert (first / "machine-0" / "checkpoints").is_dir()
    shutil.rmtree(first)
    second = run("second", s3)
    best = [
        sorted(p.name for p in (second / f"machine-{n}" / "checkpoints").glob("s*")) for n in "01"
    ]
    assert best[1], "each machine has fetched what it needed"
    assert weights(second / "machine-0") == weights(plain / "machine-0")
    storage = RunStorage.open(s3).storage
    sample_log.fetch(storage, tmp_path / "read")
    assert sample_log.read(tmp_path / "read") == sample_log.read(plain / "machine-0")


def test_copies_are_removed_at_the_end_but_not_the_drivers_folder(
    digits: Path, s3: str, tmp_path: Path
) -> None:
    """Whichever machine the driver is on: several machines may share the folder of runs."""
    recipe = small(digits, **{"train.epochs": 1})
    driver = tmp_path / "machine-0"
    driver.mkdir()
    (driver / "run.json").write_text("{}")
    payload = {"recipe": recipe.to_json(), "home": str(tmp_path), "storage": s3}
    for result in gloo_ranks.run(WORK, "train_apart", 2, {**payload, "shared_file": "run.json"}):
        assert "error" not in result, result
    assert (driver / "checkpoints").is_dir()
    assert not (tmp_path / "machine-1").exists()


@pytest.mark.fault(43)
def test_a_training_survives_an_outage_of_the_store(
    digits: Path,
    s3: str,
    s3_server: S3Server,
    mlflow_server: MlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with wire_to(s3_server.port) as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", wire.address)
        events: list[dict[str, Any]] = []

        def listen(event: dict[str, Any]) -> None:
            events.append(event)
            if event["kind"] == "checkpoint" and event["path"] == "step-000000024":
                wire.down()
                threading.Timer(4.0, wire.up).start()

        here = machine(tmp_path / "here", mlflow_server, s3)
        outcome = train.train(small(digits), progress=listen, context=here)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    steps = [event["step"] for event in events if event["kind"] == "checkpoint"]
    assert steps == [12 * epoch for epoch in range(1, EPOCHS + 1)]
    assert outcome.failed_events == 0
    plain = train.train(
        small(digits), progress=False, context=machine(tmp_path / "plain", mlflow_server)
    )
    assert weights(outcome.run.folder) == weights(plain.run.folder)


def test_a_run_that_is_nowhere_is_refused(
    s3: str, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    from models.core.errors import TesseraError

    here = machine(tmp_path, mlflow_server, s3)
    with pytest.raises(TesseraError, match="has no runs yet"):
        train.resume("any", progress=False, context=here)
    assert replace(here, storage=None).remote_storage == ""


@pytest.mark.fault(35)
def test_a_driver_that_was_stopped_and_replaced_writes_nothing_more(
    digits: Path, s3: str, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """The same command on two machines, as a cluster would repeat it: one run, each point once."""
    file = tmp_path / "recipe.yaml"
    file.write_text(small(digits, **{"train.epochs": 40}).to_json())

    def begin(home: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, str(file), "--storage", s3, "--run", "nightly", "--json"],
            env={
                **os.environ,
                "TESSERA_HOME": str(tmp_path / home),
                "MLFLOW_TRACKING_URI": mlflow_server.uri,
            },
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    storage = open_storage(f"{s3}/runs/nightly")
    first = begin("one")
    deadline = time.monotonic() + 120
    while not any(name.endswith("manifest.json") for name in storage.names("checkpoints")):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGSTOP)
    second = begin("two")
    out, err = second.communicate(timeout=180)
    assert second.returncode == 0, err
    stored = {name: storage.size(name) for name in storage.names()}
    result = json.loads(out)
    os.kill(first.pid, signal.SIGCONT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "has replaced attempt 1 of nightly" in err
    assert "Traceback" not in err
    assert stored == {name: storage.size(name) for name in storage.names()}
    run_id = json.loads(storage.read("run.json"))["run_id"]
    points = history(mlflow_server, run_id, "val/accuracy")
    assert [step for step, _ in points] == list(range(1, 41))
    again, err = begin("three").communicate(timeout=60)
    assert json.loads(again) == {**result, "images/s": json.loads(again)["images/s"]}
