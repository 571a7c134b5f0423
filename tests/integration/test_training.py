"""Trainings on a real Ray, tracked in a real MLflow, and killed.

One training on two workers is killed twice: first one of its workers, then its driver. It must end
with the weights of an undisturbed training, bit for bit, as one MLflow run without repeated steps,
and every sample must be used once per epoch. A copy of it is resumed with another number of
workers. Tests that need no Ray are in `tests/pipelines/training`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from cli_runner import Call
from once_per_run import copy_home

from jobs import train as train_verb
from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.recipe import Recipe
from pipelines.tracking.events import read_events
from pipelines.training import run as training_run
from pipelines.training import sample_log
from pipelines.training.run import Run
from pipelines.workflows import services, train
from pipelines.workflows.context import Context

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

EPOCHS, STEPS = 8, 8 * 15
LOSS_TOLERANCE = 1e-4
"""Of a network without BatchNorm, between worker counts: what the order of additions may do."""


def small(digits: Path, workers: int, **changes: Any) -> Recipe:
    """`cnn` tiny: no BatchNorm, no dropout. fp32, and every step is logged."""
    return recipes.start("cnn", "tiny").with_overrides(
        {
            "data.path": str(digits),
            "data.digest": cards.read(digits).digest,
            "train.epochs": EPOCHS,
            "train.batch_size": 96,
            "train.precision": "fp32",
            "train.log_every_steps": 1,
            "data.sample_log": True,
            "workers.count": workers,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def home(own_home: Path) -> Path:
    return own_home


@dataclass(frozen=True)
class Killed:
    """A training that was killed and resumed, and TESSERA_HOME as it was before the resume."""

    run: Run
    version: str
    before: Path


@pytest.fixture(scope="module")
def killed(
    kept_workers: None, home: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Killed:
    """A training on two Ray workers by a driver of its own, on the cluster of the tests. Rank 1 is
    killed in mid-training, later the driver, and the run is resumed on two workers."""
    import ray

    scratch = tmp_path_factory.mktemp("killed")
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(small(digits, 2).model_dump(mode="json")))
    runs = Context.from_environment().runs_dir
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.train", str(scratch / "recipe.yaml")],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stderr=subprocess.DEVNULL,
    )

    def alive() -> bool:
        assert process.poll() is None, "the driver ended early"
        return True

    (folder,) = wait_for(lambda: alive() and runs.is_dir() and list(runs.iterdir()))
    wait_for(lambda: alive() and reached(folder, 2))
    os.kill(worker_pids(folder)[1], signal.SIGKILL)
    wait_for(lambda: alive() and len(worker_pids(folder)) == 4 and reached(folder, 4))
    process.kill()
    process.wait()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in worker_pids(folder)))
    before = copy_home(home, scratch / "home")
    outcome = train.resume(folder.name, workers=2, progress=False)
    version = f"{outcome.version.name}/{outcome.version.number}"
    return Killed(training_run.find(runs, folder.name), version, before)


def worker_pids(folder: Path) -> list[int]:
    """Of all attempts so far, each with rank 0 and rank 1 in this order."""
    started = [e for e in events(folder) if e["kind"] == "worker"]
    attempts = zip(started[::2], started[1::2], strict=False)  # the second may be starting
    return [e["pid"] for pair in attempts for e in sorted(pair, key=lambda e: e["rank"])]


def losses(run: Run) -> list[float]:
    return [value for _, value in training_run.history(run)["train/loss"]]


def check_one_run(run: Run, epochs: int, steps: int) -> None:
    """MLflow has one finished run of this name, with every step and epoch exactly once."""
    client = services.attach_tracker(
        Context.from_environment(),
        training_run.find(Context.from_environment().runs_dir, run.name).run_id,
    )._client
    experiment = client.get_experiment_by_name("tessera")
    result = client.search_runs(
        [experiment.experiment_id], filter_string=f"tags.`tessera.run` = '{run.name}'"
    )
    assert len(result) == 1
    assert result[0].info.status == "FINISHED"
    run_id = result[0].info.run_id
    train_steps = [m.step for m in client.get_metric_history(run_id, "train/loss")]
    epoch_steps = [m.step for m in client.get_metric_history(run_id, "val/accuracy")]
    assert sorted(train_steps) == list(range(1, steps + 1))
    assert sorted(epoch_steps) == list(range(1, epochs + 1))


def events(run_folder: Path) -> list[dict[str, Any]]:
    log = run_folder / "events.jsonl"
    return [event for event, _ in read_events(log)] if log.exists() else []


def wait_for(condition: Callable[[], Any], seconds: float = 600) -> Any:
    """Waits until `condition` returns a value. The limit is long: Ray starts slowly next to
    other tests."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise TimeoutError(f"{condition} did not come true in {seconds} s")


def reached(folder: Path, epoch: int) -> bool:
    return any(e["kind"] == "checkpoint" for e in events(folder)) and any(
        e["kind"] == "metrics" and e.get("epoch", 0) >= epoch for e in events(folder)
    )


def kinds(run: Run) -> Counter[str]:
    return Counter(e["kind"] for e in events(run.folder))


@pytest.mark.fault(17, 32)
def test_a_training_whose_worker_and_driver_were_killed_is_one_run(
    killed: Killed, digits: Path
) -> None:
    seen = kinds(killed.run)
    assert (seen["restart"], seen["resume"], seen["worker"]) == (1, 2, 6)
    check_one_run(killed.run, EPOCHS, STEPS)
    assert losses(killed.run)[-1] < losses(killed.run)[0] / 2, "nothing was learned"
    samples = cards.read(digits).split("train").samples
    used = sample_log.read(killed.run.folder)
    assert sorted(used) == list(range(EPOCHS))
    for epoch, result in used.items():
        assert Counter(result) == Counter(range(samples)), f"epoch {epoch}"


def test_kills_do_not_change_the_weights(killed: Killed, call: Call) -> None:
    """`reproduce` trains the recipe again, this time undisturbed, on two workers."""
    response = json.loads(call("reproduce", killed.version, "--json").out)
    assert response["weights"] == "the same, bit for bit"
    assert (response["reproduced"], response["differences"]) == (True, [])


def test_a_killed_training_is_resumed_with_another_number_of_workers(
    killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(killed.before))
    arguments = ["--resume", killed.run.name, "--workers", "0", "--json"]
    assert train_verb.command.main(arguments, standalone_mode=False) == 0
    run = training_run.find(Context.from_environment().runs_dir, killed.run.name)
    assert run.folder != killed.run.folder
    assert kinds(run)["worker"] == 5
    check_one_run(run, EPOCHS, STEPS)
    alone, together = losses(run), losses(killed.run)
    assert alone != together, "it was trained on two workers"
    assert max(abs(a - b) for a, b in zip(alone, together, strict=True)) < LOSS_TOLERANCE


def test_a_finished_run_is_not_trained_again(
    killed: Killed, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--resume", killed.run.name, "--workers", "0", "--json"]
    assert train_verb.command.main(arguments, standalone_mode=False) == 0
    response = json.loads(capsys.readouterr().out)
    assert response["model"] == f"models:/{killed.version}"
    check_one_run(killed.run, EPOCHS, STEPS)


def test_resume_refuses_other_settings(killed: Killed) -> None:
    arguments = ["--resume", killed.run.name, "--workers", "0", "--set", "seed=5", "--json"]
    with pytest.raises(TesseraError, match="seed was 0, is 5"):
        train_verb.command.main(arguments, standalone_mode=False)


def test_an_embedded_ray_listens_on_loopback_only() -> None:
    listening = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray ends idle workers at any time
            listening |= {
                (process.name(), connection.laddr.ip)
                for connection in process.net_connections()
                if connection.status == psutil.CONN_LISTEN
            }
    assert listening, "nothing listens"
    away = {name for name, ip in listening if ip.removeprefix("::ffff:") != "127.0.0.1"}
    assert not away


def test_more_workers_than_cpus_are_refused_at_once(home: Path, digits: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TesseraError, match="there are 4 CPUs"):
        train.train(small(digits, 5), progress=False)
    assert time.monotonic() - began < 10


@pytest.mark.fault(42)
def test_no_event_is_lost_when_mlflow_is_down_during_training(
    start_mlflow: Any, home: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", start_mlflow.uri)
    before = set(Context.from_environment().runs_dir.iterdir())
    down: dict[str, float] = {}

    def outage() -> None:
        folder = wait_for(
            lambda: next(iter(set(Context.from_environment().runs_dir.iterdir()) - before), None)
        )
        wait_for(lambda: reached(folder, 2))
        start_mlflow.kill()
        down["from"] = time.time()
        time.sleep(3)
        start_mlflow.start()
        down["to"] = time.time()

    thread = threading.Thread(target=outage)
    thread.start()
    epochs = 60
    # In this process: training and shipping share an interpreter, where a wait would show most.
    outcome = train.train(small(digits, 0, **{"train.epochs": epochs}), progress=False)
    thread.join()
    assert outcome.failed_events == 0
    check_one_run(outcome.run, epochs, epochs * 15)
    logged = [e for e in events(outcome.run.folder) if "train/loss" in e.get("values", {})]
    inside = [e for e in logged if down["from"] < e["time_ms"] / 1000 < down["to"]]
    assert len(inside) > 100, "the outage was not in mid-training"
    waits = [
        ((b["time_ms"] - a["time_ms"]) / 1000, down["from"] < a["time_ms"] / 1000 < down["to"])
        for a, b in itertools.pairwise(logged)
        if a["epoch"] == b["epoch"]
    ]
    during = max(seconds for seconds, away in waits if away)
    otherwise = max(seconds for seconds, away in waits if not away)
    # Where the machine itself stops everything for a second, it does so without an outage too.
    assert during < max(1.0, 2 * otherwise)
