"""Trainings on a real Ray, tracked in a real MLflow, and killed.

The reference is an undisturbed training on two workers. A training whose worker was killed must end
with the same weights, bit for bit. A training whose driver was killed resumes with another number
of workers. Each is one MLflow run without repeated steps. Tests that need no Ray are in
`tests/pipelines/training`.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runner import Call
from safetensors.torch import load_file

from jobs import train as train_verb
from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.recipe import Recipe
from pipelines.tracking.events import read_events
from pipelines.training import run as training_run
from pipelines.training.driver import Outcome
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
            "workers.count": workers,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def home(own_home: Path) -> Path:
    return own_home


@pytest.fixture(scope="module")
def undisturbed(home: Path, digits: Path) -> Outcome:
    """A training on two Ray workers."""
    return train.train(small(digits, 2), progress=False)


def losses(run: Run) -> list[float]:
    return [value for _, value in training_run.history(run)["train/loss"]]


def weights_equal(one: Run, other: Run) -> bool:
    files = [sorted(r.folder.glob("checkpoints/step-*"))[-1] for r in (one, other)]
    a, b = (load_file(f / "weights.safetensors") for f in files)
    return a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a)


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


def apart(one: Run, other: Run) -> float:
    return max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))


def test_weights_do_not_depend_on_the_number_of_workers(undisturbed: Outcome, digits: Path) -> None:
    alone = train.train(small(digits, 0), progress=False)
    assert len(losses(alone.run)) == STEPS
    assert losses(alone.run)[-1] < losses(alone.run)[0] / 2, "nothing was learned"
    assert apart(alone.run, undisturbed.run) < LOSS_TOLERANCE
    for outcome in (alone, undisturbed):
        check_one_run(outcome.run, EPOCHS, STEPS)


def test_a_killed_worker_does_not_change_the_weights(
    undisturbed: Outcome, digits: Path, home: Path
) -> None:
    before = set(Context.from_environment().runs_dir.iterdir())
    killed: list[int] = []

    def kill() -> None:
        folder = wait_for(
            lambda: next(iter(set(Context.from_environment().runs_dir.iterdir()) - before), None)
        )
        wait_for(lambda: reached(folder, 3))
        pid = next(e["pid"] for e in events(folder) if e["kind"] == "worker" and e["rank"] == 1)
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    outcome = train.train(small(digits, 2), progress=False)
    thread.join()
    kinds = [e["kind"] for e in events(outcome.run.folder)]
    assert killed
    assert kinds.count("restart") == 1
    assert kinds.count("resume") == 1
    check_one_run(outcome.run, EPOCHS, STEPS)
    assert losses(outcome.run) == losses(undisturbed.run)
    assert weights_equal(outcome.run, undisturbed.run)


def test_a_killed_driver_is_resumed_in_the_same_run(
    undisturbed: Outcome, digits: Path, home: Path, tmp_path: Path
) -> None:
    import ray

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small(digits, 2).model_dump(mode="json")))
    before = set(Context.from_environment().runs_dir.iterdir())
    address = ray.get_runtime_context().gcs_address
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.train", str(recipe)],
        env={**os.environ, "RAY_ADDRESS": address},
        stderr=subprocess.DEVNULL,
    )
    folder = wait_for(
        lambda: next(iter(set(Context.from_environment().runs_dir.iterdir()) - before), None)
    )
    wait_for(lambda: reached(folder, 3))
    process.kill()
    process.wait()
    wait_for(lambda: ray.available_resources().get("CPU", 0) >= 4)  # its workers are gone
    arguments = ["--resume", folder.name, "--workers", "0", "--json"]
    assert train_verb.command.main(arguments, standalone_mode=False) == 0
    run = training_run.find(Context.from_environment().runs_dir, folder.name)
    kinds = [e["kind"] for e in events(folder)]
    assert kinds.count("resume") == 1
    check_one_run(run, EPOCHS, STEPS)
    assert apart(run, undisturbed.run) < LOSS_TOLERANCE


def test_a_training_on_two_workers_is_reproduced_bit_for_bit(
    undisturbed: Outcome, call: Call
) -> None:
    response = json.loads(call("reproduce", f"digits/{undisturbed.version.number}", "--json").out)
    assert response["weights"] == "the same, bit for bit"
    assert (response["reproduced"], response["differences"]) == (True, [])


def test_an_embedded_ray_listens_on_loopback_only() -> None:
    import psutil

    listening = {
        (process.name(), connection.laddr.ip)
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening, "nothing listens"
    away = {name for name, ip in listening if ip.removeprefix("::ffff:") != "127.0.0.1"}
    assert not away


def test_a_finished_run_is_not_trained_again(
    undisturbed: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    name = undisturbed.run.name
    arguments = ["--resume", name, "--workers", "0", "--json"]
    assert train_verb.command.main(arguments, standalone_mode=False) == 0
    response = json.loads(capsys.readouterr().out)
    assert response["model"] == f"models:/digits/{undisturbed.version.number}"
    check_one_run(undisturbed.run, EPOCHS, STEPS)


def test_resume_refuses_other_settings(undisturbed: Outcome) -> None:
    arguments = ["--resume", undisturbed.run.name, "--workers", "0", "--set", "seed=5", "--json"]
    with pytest.raises(TesseraError, match="seed was 0, is 5"):
        train_verb.command.main(arguments, standalone_mode=False)


def test_more_workers_than_cpus_are_refused_at_once(home: Path, digits: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TesseraError, match="there are 4 CPUs"):
        train.train(small(digits, 5), progress=False)
    assert time.monotonic() - began < 10


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
        time.sleep(10)
        start_mlflow.start()
        down["to"] = time.time()

    thread = threading.Thread(target=outage)
    thread.start()
    epochs = 120
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
