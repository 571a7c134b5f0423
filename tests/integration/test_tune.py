"""A search on a real Ray with a real MLflow.

Its runs in MLflow, trials that are stopped or fail, and resuming after the driver was killed.
"""

from __future__ import annotations

import itertools
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
from searches import EPOCHS, SETTINGS, check_runs, folder_of, runs_of, start, wait_for, write_space

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


def test_a_grid_with_a_trial_that_diverges_and_a_refit(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of 1e30 the loss is not finite: that trial fails, the search
    continues. The same command again prints the same result and searches nothing."""
    space = write_space(tmp_path, optim__model__lr=[0.05, 1e30])
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--search", "grid", "--space", space]
    arguments += ["--workers-per-trial", "0", "--refit", "--run", "rates", "--json"]
    printed = []
    for _ in range(2):
        assert tune.command.main(arguments, standalone_mode=False) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    with pytest.raises(UsageError, match="rates was begun with other settings: seed was 0, is 1"):
        tune.command.main([*arguments, "--seed", "1"], standalone_mode=False)
    response = json.loads(printed[0])
    assert response["search"] == "rates"
    name = response["search"]
    standing = check_runs(name, 2)
    by_rate = {t["settings"]["optim.model.lr"]: t for t in standing}
    assert by_rate[1e30]["status"] == "failed"
    assert "not finite" in by_rate[1e30]["reason"]
    assert by_rate[0.05]["status"] == "finished"
    assert len(by_rate[0.05]["curve"]) == EPOCHS
    assert response["winner"]["id"] == by_rate[0.05]["id"]
    winner = yaml.safe_load((folder_of(name) / "winner.yaml").read_text())
    assert winner["optim"]["model"]["lr"] == 0.05

    version = model_reference.resolve(
        services.open_registry(Context.from_environment()), response["model"]
    )
    assert version.aliases == ("challenger",)
    assert version.tags["tessera.search"] == name
    assert version.tags["tessera.trial"] == response["winner"]["id"]
    refit = services.attach_tracker(Context.from_environment(), version.run_id)
    assert refit._client.get_run(version.run_id).data.tags["tessera.search"] == name
    assert response["refit"]["accuracy"] == pytest.approx(response["winner"]["value"], abs=1e-9)


def test_a_process_reused_after_a_stopped_trial_gives_the_same_result(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next trial in the same process has the same result as alone."""
    rates = [0.05, 0.04, 1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 0.03]
    space = write_space(tmp_path, optim__model__lr=rates)
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--search", "grid", "--space", space]
    arguments += ["--set", "train.epochs=30", "--set", "train.log_every_steps=1", "--json"]
    assert tune.command.main([*arguments, "--workers-per-trial", "0"], standalone_mode=False) == 0
    name = json.loads(capsys.readouterr().out)["search"]
    standing = check_runs(name, len(rates))
    processes: dict[int, list[dict[str, Any]]] = {}
    for trial in standing:
        events = [
            e
            for e, _ in read_events(
                training_run.find(folder_of(name) / "trials", trial["run"]).event_log
            )
        ]
        (process,) = [e["pid"] for e in events if e["kind"] == "worker"]
        processes.setdefault(process, []).append(trial)
        if trial["status"] == "stopped":
            told = [e["epoch"] for e in events if e["kind"] == "metrics"]
            assert max(told) < 30, "it was trained to its end"
    assert len(processes) < len(rates)  # Tune keeps one if the next trial waits for it already
    pairs = [pair for own in processes.values() for pair in itertools.pairwise(own)]
    _, after = next(pair for pair in pairs if pair[0]["status"] == "stopped")
    run = training_run.find(folder_of(name) / "trials", after["run"])
    alone = tmp_path / "alone"
    payload = rank_work.payload_for(run.recipe(), alone, until_epoch=len(after["curve"]))
    worker.run(payload, World(), EventLog(alone / "events.jsonl"))
    events = [e for e, _ in read_events(alone / "events.jsonl")]
    curve = [
        [e["epoch"], e["values"]["val/accuracy"]]
        for e in events
        if "val/accuracy" in e.get("values", ())
    ]
    assert curve == after["curve"]


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
    """The driver is killed after a trial has ended; its embedded cluster ends with it. Tune's
    record always lags behind, so here it is reset to a state before any trial had ended."""
    space = write_space(tmp_path, optim__model__lr=[0.05, 0.04, 0.03, 0.02])
    words = [sys.executable, "-m", "jobs.tune", "cnn", "--data", str(digits), *SETTINGS]
    words += ["--search", "grid", "--space", space, "--scheduler", "none"]
    words += ["--workers-per-trial", "0"]
    process = start(words)
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

    assert tune.command.main(["--resume", name, "--json"], standalone_mode=False) == 0
    response = json.loads(capsys.readouterr().out)
    trials = check_runs(name, 4)
    assert before <= {t["id"] for t in trials}
    assert sorted(t["settings"]["optim.model.lr"] for t in trials) == [0.02, 0.03, 0.04, 0.05]
    assert {t["status"] for t in trials} == {"finished"}
    assert len(response["trials"]) == 4
    for trial in trials:
        run = training_run.find(folder_of(name) / "trials", trial["run"])
        steps = [step for step, _ in training_run.history(run)["val/accuracy"]]
        assert steps == list(range(1, EPOCHS + 1))
        assert [epoch for epoch, _ in trial["curve"]] == steps
        if trial["id"] in done:
            assert trial["curve"] == done[trial["id"]]["curve"]
            assert logs[trial["id"]].read_bytes() == trained[trial["id"]], "it was trained again"


def test_a_search_ended_by_control_c_can_be_resumed(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tune handles the signal itself and returns as if the search were complete: no refit may
    follow."""
    space = write_space(tmp_path, optim__model__lr=[0.05, 0.04])
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--search", "grid", "--space", space]
    arguments += ["--set", "train.epochs=3000", "--workers-per-trial", "0", "--refit"]
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.2):
            for file in Context.from_environment().searches_dir.glob("*/trials.json"):
                if any(trial["curve"] for trial in json.loads(file.read_text())):
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
    parent, _ = runs_of(name)
    assert parent.info.status == "KILLED"
    assert services.open_registry(Context.from_environment()).names() == []


def test_the_settings_are_those_that_optuna_samples(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Optuna alone samples the same settings with the same seed; one setting is a list."""
    optuna = pytest.importorskip(
        "optuna", reason="optuna isn't installed: pip install 'tessera-train[optuna]'"
    )
    space = write_space(
        tmp_path, optim__model__lr={"log_uniform": [1e-3, 0.1]}, model__channels=[[4, 8], [8, 16]]
    )
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--search", "optuna", "--space", space]
    arguments += ["--set", "train.epochs=1", "--workers-per-trial", "0", "--trials", "3"]
    assert tune.command.main([*arguments, "--seed", "5", "--json"], standalone_mode=False) == 0
    response = json.loads(capsys.readouterr().out)
    trials = check_runs(response["search"], 3)
    assert {t["status"] for t in trials} == {"finished"}

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=5))
    alone = []
    for _ in trials:
        sampled = study.ask()
        widths = sampled.suggest_categorical(
            "model.channels", ["[4, 8]", "[8, 16]"]
        )  # as in the file
        rate = sampled.suggest_float("optim.model.lr", 1e-3, 0.1, log=True)
        alone.append({"optim.model.lr": rate, "model.channels": json.loads(widths)})

    def rate_of(settings: dict[str, Any]) -> float:
        return float(settings["optim.model.lr"])

    assert sorted((t["settings"] for t in trials), key=rate_of) == sorted(alone, key=rate_of)
