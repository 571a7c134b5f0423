"""A search on a real Ray with a real MLflow: its runs there, what is stopped, what fails, and going
on after the driver was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import driver, embedded, searching, tune
from models.core.errors import TesseraError
from pipelines import runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

EPOCHS = 4
SETTINGS = [
    *("--variant", "tiny"),
    *("--set", f"train.epochs={EPOCHS}"),
    *("--set", "train.batch_size=96"),
    *("--set", "train.precision=fp32"),
]


@pytest.fixture
def home(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    root = tmp_path / ".tessera"
    shutil.move(store, root)
    monkeypatch.setenv("TESSERA_HOME", str(root))
    return root


def write_space(tmp_path: Path, **space: Any) -> str:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({name.replace("__", "."): v for name, v in space.items()}))
    return str(path)


def runs_of(name: str) -> tuple[Any, list[Any]]:
    """MLflow's run of a search, and those of its trials."""
    parent = driver.attach_tracker(searching.find(name).parent)
    client = parent._client
    children = client.search_runs(
        [parent.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    return client.get_run(parent.run_id), children


def check_runs(name: str, trials: int) -> list[Any]:
    """One run for the search and one for each trial, all ended, each with what was sampled."""
    parent, children = runs_of(name)
    assert parent.info.status == "FINISHED"
    standing = {t["id"]: t for t in json.loads((folder_of(name) / "trials.json").read_text())}
    assert len(standing) == trials
    assert sorted(c.data.tags["tessera.trial"] for c in children) == sorted(standing)
    for child in children:
        trial = standing[child.data.tags["tessera.trial"]]
        assert child.data.tags["tessera.trial.status"] == trial["status"]
        failed = trial["status"] == "failed"
        assert child.info.status == ("FAILED" if failed else "FINISHED")
        for path, value in trial["settings"].items():
            assert json.loads(child.data.params[path]) == value
    return list(standing.values())


def folder_of(name: str) -> Path:
    return embedded.searches_dir() / name


def test_a_grid_with_a_trial_that_diverges_and_a_refit(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1e30 gives a loss that is not finite: that trial fails, and the search goes on."""
    space = write_space(tmp_path, optim__model__lr=[0.05, 1e30, 0.01])
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--search", "grid", "--space", space]
    assert tune.command.main([*arguments, "--refit", "--json"], standalone_mode=False) == 0
    answer = json.loads(capsys.readouterr().out)
    name = answer["search"]
    trials = check_runs(name, 3)
    by_rate = {t["settings"]["optim.model.lr"]: t for t in trials}
    assert by_rate[1e30]["status"] == "failed"
    assert "not finite" in by_rate[1e30]["reason"]
    assert by_rate[0.05]["status"] == "finished"
    assert len(by_rate[0.05]["curve"]) == EPOCHS
    assert answer["winner"]["id"] == by_rate[0.05]["id"]
    winner = yaml.safe_load((folder_of(name) / "winner.yaml").read_text())
    assert winner["optim"]["model"]["lr"] == 0.05

    version = driver.resolve(driver.open_registry(), answer["model"])
    assert version.aliases == ("challenger",)
    assert version.tags["tessera.search"] == name
    assert version.tags["tessera.trial"] == answer["winner"]["id"]
    refit = driver.attach_tracker(version.run_id)
    assert refit._client.get_run(version.run_id).data.tags["tessera.search"] == name
    assert answer["refit"]["accuracy"] == pytest.approx(answer["winner"]["value"], abs=1e-9)


def test_more_than_the_cluster_has_is_refused_at_once(home: Path, digits: Path) -> None:
    began = time.monotonic()
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--workers-per-trial", "5"]
    with pytest.raises(TesseraError, match=r"takes 5 CPUs .*the cluster has 4"):
        tune.command.main(arguments, standalone_mode=False)
    assert time.monotonic() - began < 10
    assert not list(embedded.searches_dir().glob("*")), "a search was left that never began"


def test_killed_and_resumed_it_loses_and_repeats_no_trial(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver is killed once a trial has ended; an embedded cluster dies with it."""
    space = write_space(tmp_path, optim__model__lr=[0.05, 0.04, 0.03, 0.02])
    words = [sys.executable, "-m", "jobs.tune", "cnn", "--data", str(digits), *SETTINGS]
    words += ["--search", "grid", "--space", space, "--scheduler", "none"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        words, env={**clean, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    done: dict[str, Any] = {}
    while not done and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        for file in embedded.searches_dir().glob("*/trials.json"):
            standing = json.loads(file.read_text())
            done = {t["id"]: t for t in standing if t["status"] == "finished"}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert done, "no trial ended"
    (name,) = [path.name for path in embedded.searches_dir().iterdir()]
    before = {t["id"] for t in json.loads((folder_of(name) / "trials.json").read_text())}
    assert len(done) < 4

    assert tune.command.main(["--resume", name, "--json"], standalone_mode=False) == 0
    answer = json.loads(capsys.readouterr().out)
    trials = check_runs(name, 4)
    assert before <= {t["id"] for t in trials}
    assert sorted(t["settings"]["optim.model.lr"] for t in trials) == [0.02, 0.03, 0.04, 0.05]
    assert {t["status"] for t in trials} == {"finished"}
    assert len(answer["trials"]) == 4
    for trial in trials:
        run = runs.find(folder_of(name) / "trials", trial["run"])
        steps = [step for step, _ in runs.history(run)["val/accuracy"]]
        assert steps == list(range(1, EPOCHS + 1))
        assert [epoch for epoch, _ in trial["curve"]] == steps
        if trial["id"] in done:
            assert trial["curve"] == done[trial["id"]]["curve"]
