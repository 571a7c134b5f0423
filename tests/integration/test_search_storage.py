"""Searches whose files are in a real S3 store go on from another machine."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import searches
from mlflow_server import MlflowServer
from searches import SETTINGS, check_runs, folder_of, start, wait_for, write_space
from stored_runs import expire_lease

from pipelines.storage.base import Storage
from pipelines.storage.open import open_storage
from pipelines.training import run as training_run
from pipelines.workflows import tune
from pipelines.workflows.context import Context

pytestmark = pytest.mark.cluster


def state(storage: Storage, name: str) -> Any:
    """A file of the only search in the storage; None before there is one."""
    for search in storage.folders("searches"):
        if storage.size(f"searches/{search}/{name}") is not None:
            return json.loads(storage.read(f"searches/{search}/{name}"))
    return None


def lose_machine(
    words: list[str], home: Path, storage: Storage, happened: Any, patch: pytest.MonkeyPatch
) -> str:
    """Starts a search on one machine, and kills it with its disk when `happened`; the rest of the
    test is on another one. Returns the search's name."""
    patch.setenv("TESSERA_HOME", str(home / "lost"))
    process = start([sys.executable, "-m", "jobs.tune", "cnn", *SETTINGS, *words])
    wait_for(process, happened)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(home / "lost")
    patch.setenv("TESSERA_HOME", str(home / "there"))
    (name,) = storage.folders("searches")
    expire_lease(storage, f"searches/{name}")
    return name


@pytest.fixture
def storage(
    s3: str, mlflow_server: MlflowServer, mlflow_settings: None, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    monkeypatch.setenv("TESSERA_STORAGE", s3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    return open_storage(s3)


def test_a_search_goes_on_when_its_machine_is_lost(
    digits: Path, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = write_space(tmp_path, optim__model__lr=[0.05, 0.04, 0.03, 0.02])
    words = ["--data", str(digits), "--search", "grid", "--space", space, "--scheduler", "none"]

    def ended() -> list[Any]:
        return [t for t in state(storage, "trials.json") or [] if t["status"] == "finished"]

    name = lose_machine(
        [*words, "--workers-per-trial", "0"],
        tmp_path,
        storage,
        lambda: bool(ended()),
        monkeypatch,
    )
    done = {trial["id"]: trial["curve"] for trial in ended()}
    assert 0 < len(done) < 4
    result = tune.resume(name, progress=False)
    trials = check_runs(name, 4)
    assert sorted(t["settings"]["optim.model.lr"] for t in trials) == [0.02, 0.03, 0.04, 0.05]
    assert {t["id"]: t["curve"] for t in trials if t["id"] in done} == done
    steps = list(range(1, searches.EPOCHS + 1))
    assert all([epoch for epoch, _ in t["curve"]] == steps for t in trials)
    assert result.winner.value == max(value for t in trials for _, value in t["curve"])
    stored = storage.names(f"searches/{name}")
    assert f"searches/{name}/winner.yaml" in stored
    assert any(f"searches/{name}/pictures/" in file for file in stored)
    assert not any("/tune/" in file for file in stored), "reading Tune's state would execute it"


def test_a_population_goes_on_when_its_machine_is_lost(
    digits: Path, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = write_space(tmp_path, optim__model__lr=[0.05, 0.04, 0.03, 0.02])
    words = ["--data", str(digits), "--scheduler", "pbt", "--trials", "4", "--interval", "1"]
    words += ["--space", space]

    def exploited() -> bool:
        population = state(storage, "population.json")
        return bool(population and population["generation"] >= 2)

    name = lose_machine(
        [*words, "--workers-per-trial", "0"], tmp_path, storage, exploited, monkeypatch
    )
    tune.resume(name, progress=False)
    trials = check_runs(name, 4)
    population = json.loads((folder_of(name) / "population.json").read_text())
    assert population == state(storage, "population.json")
    assert population["generation"] == searches.EPOCHS - 1
    assert any("donor" in change for t in trials for change in t["changes"])
    context = Context.from_environment()
    for trial in trials:
        folder = folder_of(name) / "trials" / trial["run"]
        address = f"{context.remote_storage}/searches/{name}/trials/{trial['run']}"
        run = training_run.open_existing(folder, address)
        assert run is not None
        steps = [step for step, _ in training_run.history(run)["val/accuracy"]]
        assert steps == list(range(1, searches.EPOCHS + 1))
