"""A search on a real Ray with a real MLflow.

One search is killed and resumed; one of its trials diverges. Another one reuses the process of a
stopped trial, and ends with Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import click
import pytest
import rank_work
import yaml
from searches import (
    EPOCHS,
    SETTINGS,
    TWO_AT_ONCE,
    check_runs,
    folder_of,
    runs_of,
    start,
    wait_for,
    write_space,
)

from jobs import tune
from models.core.errors import TesseraError, UsageError
from pipelines.interfaces import World
from pipelines.tracking.events import EventLog, read_events
from pipelines.training import run as training_run
from pipelines.training import worker
from pipelines.workflows import model_reference, services
from pipelines.workflows.context import Context

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def home(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    root = tmp_path / ".tessera"
    shutil.move(store, root)
    monkeypatch.setenv("TESSERA_HOME", str(root))
    return root


def test_more_resources_than_the_cluster_has_are_refused_at_once(home: Path, digits: Path) -> None:
    began = time.monotonic()
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--workers-per-trial", "5"]
    with pytest.raises(TesseraError, match=r"no trial fits: .*5 workers.* has 4") as caught:
        tune.command.main(arguments, standalone_mode=False)
    assert "--workers-per-trial" in caught.value.hint
    assert time.monotonic() - began < 10
    assert not list(Context.from_environment().searches_dir.glob("*")), (
        "a search was left that never began"
    )


def test_a_killed_search_resumes_without_losing_or_repeating_a_trial(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver is killed after a trial has ended; its cluster keeps running. Tune's record
    always lags behind, so here it is reset to a state before any trial had ended. With a learning
    rate of 1e30 the loss is not finite: that trial fails, the search continues. The same command
    resumes the search by its name, and once more it prints the same and searches nothing."""
    import ray

    space = write_space(tmp_path, optim__model__lr=[0.05, 0.04, 1e30, 0.02])
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--search", "grid", "--space", space]
    arguments += ["--scheduler", "none", "--workers-per-trial", "0", *TWO_AT_ONCE]
    arguments += ["--refit", "--run", "rates", "--json"]
    address = ray.get_runtime_context().gcs_address
    process = start([sys.executable, "-m", "jobs.tune", *arguments], {"RAY_ADDRESS": address})
    done: dict[str, Any] = {}
    lagging = tmp_path / "lagging"

    def ended() -> bool:
        for file in Context.from_environment().searches_dir.glob("*/trials.json"):
            standing = json.loads(file.read_text())
            done.update({t["id"]: t for t in standing if t["status"] == "finished"})
            record = "".join(p.read_text() for p in file.parent.glob("tune/experiment_state-*"))
            if len(standing) == 2 and not done and all(t["id"] in record for t in standing):
                shutil.copytree(file.parent / "tune", lagging, dirs_exist_ok=True)
        return bool(done)

    wait_for(process, ended)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (name,) = [path.name for path in Context.from_environment().searches_dir.iterdir()]
    before = {t["id"] for t in json.loads((folder_of(name) / "trials.json").read_text())}
    assert len(done) < 4
    logs = {t["id"]: folder_of(name) / "trials" / t["run"] / "events.jsonl" for t in done.values()}
    trained = {trial: log.read_bytes() for trial, log in logs.items()}
    shutil.rmtree(folder_of(name) / "tune")
    shutil.copytree(lagging, folder_of(name) / "tune")

    printed = []
    for _ in range(2):
        assert tune.command.main(arguments, standalone_mode=False) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    with pytest.raises(UsageError, match="rates was begun with other settings: seed was 0, is 1"):
        tune.command.main([*arguments, "--seed", "1"], standalone_mode=False)
    response = json.loads(printed[0])
    assert response["search"] == name == "rates"
    trials = check_runs(name, 4)
    assert before <= {t["id"] for t in trials}
    by_rate = {t["settings"]["optim.model.lr"]: t for t in trials}
    assert sorted(by_rate) == [0.02, 0.04, 0.05, 1e30]
    failed = by_rate.pop(1e30)
    assert failed["status"] == "failed"
    assert "not finite" in failed["reason"]
    assert len(response["trials"]) == 4
    for trial in by_rate.values():
        assert trial["status"] == "finished"
        run = training_run.find(folder_of(name) / "trials", trial["run"])
        steps = [step for step, _ in training_run.history(run)["val/accuracy"]]
        assert steps == list(range(1, EPOCHS + 1))
        assert [epoch for epoch, _ in trial["curve"]] == steps
        if trial["id"] in done:
            assert trial["curve"] == done[trial["id"]]["curve"]
            assert logs[trial["id"]].read_bytes() == trained[trial["id"]], "it was trained again"
    check_refit(name, response)


def check_refit(name: str, response: dict[str, Any]) -> None:
    """The recipe of the best trial was written, trained in full and registered."""
    best = max(response["trials"], key=lambda t: max((v for _, v in t["curve"]), default=0.0))
    assert response["winner"]["value"] == max(value for _, value in best["curve"])
    winner = yaml.safe_load((folder_of(name) / "winner.yaml").read_text())
    assert winner["optim"]["model"]["lr"] == response["winner"]["settings"]["optim.model.lr"]
    version = model_reference.resolve(
        services.open_registry(Context.from_environment()), response["model"]
    )
    assert version.aliases == ("challenger",)
    assert version.tags["tessera.search"] == name
    assert version.tags["tessera.trial"] == response["winner"]["id"]
    refit = services.attach_tracker(Context.from_environment(), version.run_id)
    assert refit._client.get_run(version.run_id).data.tags["tessera.search"] == name
    assert response["refit"]["accuracy"] == pytest.approx(response["winner"]["value"], abs=1e-9)


def test_a_search_reuses_the_process_of_a_stopped_trial_and_is_ended_by_control_c(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three trials in turn, in one process: the first is trained to its end, the second is
    stopped, and the third has the same result as alone. During the third, the search gets a Ctrl-C.
    Tune handles the signal itself and returns as if the search were complete: no refit may
    follow."""
    rates = [0.05, 1e-6, 0.04]
    space = write_space(tmp_path, optim__model__lr=rates)
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--search", "grid", "--space", space]
    arguments += ["--set", "train.epochs=30", "--set", "workers.cpus=4", "--grace", "2"]
    arguments += ["--workers-per-trial", "0", "--refit"]
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.1):
            for file in Context.from_environment().searches_dir.glob("*/trials.json"):
                standing = json.loads(file.read_text())
                if len(standing) == 3 and len(standing[2]["curve"]) >= 2:
                    os.kill(os.getpid(), signal.SIGINT)
                    return

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(click.Abort):
            tune.command.main(arguments, standalone_mode=False)
    finally:
        ended.set()
        thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    (name,) = [path.name for path in Context.from_environment().searches_dir.iterdir()]
    assert f"resume with: tessera tune --resume {name}" in capsys.readouterr().err
    parent, children = runs_of(name)
    assert parent.info.status == "KILLED"
    assert services.open_registry(Context.from_environment()).names() == []

    full, stopped, third = json.loads((folder_of(name) / "trials.json").read_text())
    assert [t["settings"]["optim.model.lr"] for t in (full, stopped, third)] == rates
    assert (full["status"], len(full["curve"])) == ("finished", 30)
    assert stopped["status"] == "stopped"
    by_trial = {child.data.tags["tessera.trial"]: child.info.status for child in children}
    assert by_trial[stopped["id"]] == "FINISHED"
    logs = [trial_events(name, trial) for trial in (full, stopped, third)]
    assert len({e["pid"] for log in logs for e in log if e["kind"] == "worker"}) == 1
    assert max(e["epoch"] for e in logs[1] if e["kind"] == "metrics") < 30

    run = training_run.find(folder_of(name) / "trials", third["run"])
    alone = tmp_path / "alone"
    payload = rank_work.payload_for(run.recipe(), alone, until_epoch=len(third["curve"]))
    worker.run(payload, World(), EventLog(alone / "events.jsonl"))
    curve = [
        [e["epoch"], e["values"]["val/accuracy"]]
        for e, _ in read_events(alone / "events.jsonl")
        if "val/accuracy" in e.get("values", ())
    ]
    assert curve == third["curve"]


def trial_events(name: str, trial: dict[str, Any]) -> list[dict[str, Any]]:
    log = training_run.find(folder_of(name) / "trials", trial["run"]).event_log
    return [event for event, _ in read_events(log)]
