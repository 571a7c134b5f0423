"""A search on a real Ray with a real MLflow: its runs there, what is stopped, what fails, and going
on after the driver was killed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from safetensors.torch import load_file

from jobs import tune
from models.core.errors import TesseraError
from models.core.spaces import Choice
from pipelines import recipe as recipes
from pipelines import tag_names
from pipelines.interfaces import World
from pipelines.search import population
from pipelines.tracking.events import EventLog, read_events
from pipelines.training import checkpoints, worker
from pipelines.training import run as training_run
from pipelines.workflows import model_reference, search_board, services
from pipelines.workflows import trial as workflows_trial
from pipelines.workflows.context import Context

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
    parent = services.attach_tracker(
        Context.from_environment(), search_board.find(Context.from_environment(), name).parent
    )
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
        for path, value in trial["settings"].items():
            assert json.loads(child.data.params[path]) == value
    return list(standing.values())


def start(words: list[str], cluster: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A search in a process of its own, with a cluster of its own that dies with it, or on another
    one, which `cluster` names."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = {**clean, **(cluster or {}), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)


def wait_for(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert process.poll() is None, "the search ended before"
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.2)


def folder_of(name: str) -> Path:
    return Context.from_environment().searches_dir / name


def test_a_grid_with_a_trial_that_diverges_and_a_refit(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1e30 gives a loss that is not finite: that trial fails, and the search goes on."""
    space = write_space(tmp_path, optim__model__lr=[0.05, 1e30])
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--search", "grid", "--space", space]
    assert tune.command.main([*arguments, "--refit", "--json"], standalone_mode=False) == 0
    answer = json.loads(capsys.readouterr().out)
    name = answer["search"]
    standing = check_runs(name, 2)
    by_rate = {t["settings"]["optim.model.lr"]: t for t in standing}
    assert by_rate[1e30]["status"] == "failed"
    assert "not finite" in by_rate[1e30]["reason"]
    assert by_rate[0.05]["status"] == "finished"
    assert len(by_rate[0.05]["curve"]) == EPOCHS
    assert answer["winner"]["id"] == by_rate[0.05]["id"]
    winner = yaml.safe_load((folder_of(name) / "winner.yaml").read_text())
    assert winner["optim"]["model"]["lr"] == 0.05

    version = model_reference.resolve(
        services.open_registry(Context.from_environment()), answer["model"]
    )
    assert version.aliases == ("challenger",)
    assert version.tags["tessera.search"] == name
    assert version.tags["tessera.trial"] == answer["winner"]["id"]
    refit = services.attach_tracker(Context.from_environment(), version.run_id)
    assert refit._client.get_run(version.run_id).data.tags["tessera.search"] == name
    assert answer["refit"]["accuracy"] == pytest.approx(answer["winner"]["value"], abs=1e-9)


def test_a_trial_that_is_stopped_leaves_its_process_to_the_next(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing of itself in there: the next comes to what it would have come to alone."""
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
    payload = {"recipe": run.recipe().to_json(), "run_dir": str(alone)}
    payload["until_epoch"] = len(after["curve"])
    worker.run(payload, World(), EventLog(alone / "events.jsonl"))
    events = [e for e, _ in read_events(alone / "events.jsonl")]
    curve = [
        [e["epoch"], e["values"]["val/accuracy"]]
        for e in events
        if "val/accuracy" in e.get("values", ())
    ]
    assert curve == after["curve"]


def test_more_than_the_cluster_has_is_refused_at_once(home: Path, digits: Path) -> None:
    began = time.monotonic()
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--workers-per-trial", "5"]
    with pytest.raises(TesseraError, match=r"takes 5 CPUs .*the cluster has 4"):
        tune.command.main(arguments, standalone_mode=False)
    assert time.monotonic() - began < 10
    assert not list(Context.from_environment().searches_dir.glob("*")), (
        "a search was left that never began"
    )


def test_killed_and_resumed_it_loses_and_repeats_no_trial(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver is killed once a trial has ended; an embedded cluster dies with it. Tune's record
    is put back to when no trial had, as it always lags behind."""
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
    spools = {
        t["id"]: folder_of(name) / "trials" / t["run"] / "events.jsonl" for t in done.values()
    }
    trained = {trial: spool.read_bytes() for trial, spool in spools.items()}
    shutil.rmtree(folder_of(name) / "tune")
    shutil.copytree(lagging, folder_of(name) / "tune")

    assert tune.command.main(["--resume", name, "--json"], standalone_mode=False) == 0
    answer = json.loads(capsys.readouterr().out)
    trials = check_runs(name, 4)
    assert before <= {t["id"] for t in trials}
    assert sorted(t["settings"]["optim.model.lr"] for t in trials) == [0.02, 0.03, 0.04, 0.05]
    assert {t["status"] for t in trials} == {"finished"}
    assert len(answer["trials"]) == 4
    for trial in trials:
        run = training_run.find(folder_of(name) / "trials", trial["run"])
        steps = [step for step, _ in training_run.history(run)["val/accuracy"]]
        assert steps == list(range(1, EPOCHS + 1))
        assert [epoch for epoch, _ in trial["curve"]] == steps
        if trial["id"] in done:
            assert trial["curve"] == done[trial["id"]]["curve"]
            assert spools[trial["id"]].read_bytes() == trained[trial["id"]], "it was trained again"


def test_control_c_ends_it_as_what_can_go_on(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tune takes the signal for itself and ends as if all were over: nothing must be refit."""
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
    assert f"go on with: tessera tune --resume {name}" in capsys.readouterr().err
    parent, _ = runs_of(name)
    assert parent.info.status == "KILLED"
    assert services.open_registry(Context.from_environment()).names() == []


def test_optuna_chooses_the_settings(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are those that Optuna alone draws from the same seed; one is a list."""
    optuna = pytest.importorskip(
        "optuna", reason="optuna isn't installed: pip install 'tessera-train[optuna]'"
    )
    space = write_space(
        tmp_path, optim__model__lr={"log_uniform": [1e-3, 0.1]}, model__widths=[[4, 8], [8, 16]]
    )
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--search", "optuna", "--space", space]
    arguments += ["--set", "train.epochs=1", "--workers-per-trial", "0", "--trials", "3"]
    assert tune.command.main([*arguments, "--seed", "5", "--json"], standalone_mode=False) == 0
    answer = json.loads(capsys.readouterr().out)
    trials = check_runs(answer["search"], 3)
    assert {t["status"] for t in trials} == {"finished"}

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=5))
    alone = []
    for _ in trials:
        asked = study.ask()
        widths = asked.suggest_categorical("model.widths", ["[4, 8]", "[8, 16]"])  # as in the file
        rate = asked.suggest_float("optim.model.lr", 1e-3, 0.1, log=True)
        alone.append({"optim.model.lr": rate, "model.widths": json.loads(widths)})

    def rate_of(settings: dict[str, Any]) -> float:
        return float(settings["optim.model.lr"])

    assert sorted((t["settings"] for t in trials), key=rate_of) == sorted(alone, key=rate_of)


PBT = [*("--scheduler", "pbt"), *("--interval", "2"), *("--trials", "4"), *("--seed", "1")]
PBT += [*("--workers-per-trial", "0"), *("--set", "checkpoint.keep=9")]
PBT_SPACE = {
    "optim__model__lr": {"log_uniform": [1e-5, 0.1]},
    "optim__model__weight_decay": {"uniform": [0.0, 1e-3]},
}


def diverging_seed() -> int:
    """A seed with which the second member diverges, and is given the other's rate after that."""
    space = {"lr": Choice((0.05, 1e30))}
    for seed in range(1000):
        people = population.begin(space, 2, seed)
        first = [m.settings["lr"] for m in people.members]
        people.scores = {"00001": 0.5, "00002": None}
        population.advance(people, space, direction="max", seed=seed, epoch=2)
        if (first, people.members[1].settings["lr"]) == ([0.05, 1e30], 0.05):
            return seed
    raise AssertionError("no such seed")


def checkpoint(name: str, member: str, epoch: int) -> Path:
    """A member's checkpoint after an epoch."""
    folder = folder_of(name) / "trials" / workflows_trial.run_name(name, member) / "checkpoints"
    for path in folder.glob("step-*"):
        if json.loads((path / "progress.json").read_text())["epoch"] == epoch:
            return path
    raise AssertionError(f"{member} has no checkpoint of epoch {epoch}")


def check_population(name: str) -> list[dict[str, Any]]:
    """One run a member, whose record goes through all its epochs once and tells every change."""
    parent, children = runs_of(name)
    assert parent.info.status == "FINISHED"
    standing = json.loads((folder_of(name) / "trials.json").read_text())
    by_id = {child.data.tags["tessera.trial"]: child for child in children}
    assert len(children) == len(by_id) == len(standing) == 4
    client = services.attach_tracker(
        Context.from_environment(), search_board.find(Context.from_environment(), name).parent
    )._client
    for trial in standing:
        child = by_id[trial["id"]]
        assert (child.info.status, trial["status"]) == ("FINISHED", "finished")
        assert [epoch for epoch, _ in trial["curve"]] == list(range(1, EPOCHS + 1))
        told = json.loads(child.data.tags[tag_names.SETTINGS])
        assert told == trial["changes"]
        assert told[-1]["settings"] == trial["settings"]
        for path, first in told[0]["settings"].items():
            assert json.loads(child.data.params[path]) == first
            points = client.get_metric_history(child.info.run_id, f"settings/{path}")
            expected = [
                [c["settings"][path] for c in told if c["epoch"] <= e][-1]
                for e in range(1, EPOCHS + 1)
            ]
            assert [(p.step, p.value) for p in points] == list(enumerate(expected, 1))
        metrics = client.get_metric_history(child.info.run_id, "val/accuracy")
        assert [[p.step, p.value] for p in metrics] == trial["curve"]
    return list(standing)


def test_a_population_takes_over_the_weights_of_its_best(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a member came to is what comes of the donor's checkpoint and the new settings, bit for
    bit; with the settings of before it would be something else."""
    space = write_space(tmp_path, **PBT_SPACE)
    arguments = ["cnn", "--data", str(digits), *SETTINGS, *PBT, "--space", space, "--refit"]
    assert tune.command.main([*arguments, "--json"], standalone_mode=False) == 0
    answer = json.loads(capsys.readouterr().out)
    name = answer["search"]
    standing = check_population(name)
    (taker,) = [t for t in standing if len(t["changes"]) > 1]
    donor = next(t for t in standing if t["id"] == taker["changes"][1]["donor"])
    assert dict(donor["curve"])[2] > dict(taker["curve"])[2]
    assert checkpoints.verify(checkpoint(name, donor["id"], 2)) == taker["changes"][1]["checkpoint"]

    def replay(settings: dict[str, Any], where: str) -> Any:
        folder = tmp_path / where
        source = checkpoint(name, donor["id"], 2)
        shutil.copytree(source, folder / "checkpoints" / source.name)
        asked = search_board.find(Context.from_environment(), name)
        recipe = recipes.build(json.loads(asked.recipe)).with_overrides(settings)
        payload = {"recipe": recipe.to_json(), "run_dir": str(folder), "changing": list(settings)}
        found = worker.run(payload, World(), EventLog(folder / "events.jsonl"))
        return load_file(folder / "checkpoints" / found["newest"] / "weights.safetensors")

    reached = load_file(checkpoint(name, taker["id"], EPOCHS) / "weights.safetensors")
    same = replay(taker["settings"], "same")
    assert all(torch.equal(reached[key], same[key]) for key in reached)
    other = replay(donor["settings"], "other")
    assert not all(torch.equal(reached[key], other[key]) for key in reached)

    version = model_reference.resolve(
        services.open_registry(Context.from_environment()), answer["model"]
    )
    winner = next(t for t in standing if t["id"] == answer["winner"]["id"])
    assert version.tags["tessera.trial"] == winner["id"]
    assert answer["refit"]["accuracy"] == pytest.approx(winner["value"], abs=1e-9)


def test_a_member_that_diverges_takes_over_another_s_weights(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 1e30 the loss is not finite; the weights are another's from then on, the run the same.
    Here each member's training has a worker of Ray Train."""
    space = write_space(tmp_path, optim__model__lr=[0.05, 1e30])
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--set", "train.epochs=2"]
    arguments += ["--scheduler", "pbt", "--trials", "2", "--seed", str(diverging_seed())]
    assert tune.command.main([*arguments, "--space", space, "--json"], standalone_mode=False) == 0
    answer = json.loads(capsys.readouterr().out)
    good, bad = sorted(answer["trials"], key=lambda t: len(t["changes"]))
    assert [c["settings"]["optim.model.lr"] for c in bad["changes"]] == [1e30, 0.05]
    assert bad["changes"][1]["donor"] == good["id"]
    assert [epoch for epoch, _ in good["curve"]] == [1, 2]
    assert [epoch for epoch, _ in bad["curve"]] == [2]
    assert bad["curve"][0] == good["curve"][1], "the same weights, settings and order"
    _, children = runs_of(answer["search"])
    assert {child.info.status for child in children} == {"FINISHED"}
    assert len(children) == 2


def test_a_population_that_was_killed_goes_on_as_if_it_had_not_been(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver is killed in its second generation; its cluster lives on. The draws and the
    figures that decide are those of before."""
    import ray

    space = write_space(tmp_path, **PBT_SPACE)
    words = [sys.executable, "-m", "jobs.tune", "cnn", "--data", str(digits), *SETTINGS, *PBT]
    address = ray.get_runtime_context().gcs_address
    process = start([*words, "--space", space], {"RAY_ADDRESS": address})

    def generation() -> list[int]:
        files = Context.from_environment().searches_dir.glob("*/population.json")
        return [json.loads(file.read_text())["generation"] for file in files]

    wait_for(process, lambda: generation() == [1])
    process.send_signal(signal.SIGKILL)
    process.wait()
    (name,) = [path.name for path in Context.from_environment().searches_dir.iterdir()]
    before = population.read(folder_of(name) / "population.json")
    assert before is not None
    assert before.donors
    assert len(before.scores) < 4

    assert tune.command.main(["--resume", name, "--json"], standalone_mode=False) == 0
    standing = check_population(name)
    asked = search_board.find(Context.from_environment(), name)
    again = population.begin(asked.parsed_space(), 4, asked.seed)
    again.scores = {t["id"]: dict(t["curve"])[2] for t in standing}
    population.advance(again, asked.parsed_space(), direction="max", seed=asked.seed, epoch=3)
    assert {m.id: m.settings for m in again.members} == {t["id"]: t["settings"] for t in standing}
    assert again.donors == before.donors
