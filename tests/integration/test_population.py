"""Population based training on a real Ray with a real MLflow.

Trials copy weights, diverge, and are resumed after the driver was killed.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from safetensors.torch import load_file
from searches import EPOCHS, SETTINGS, folder_of, runs_of, start, wait_for, write_space

from jobs import tune
from models.core.spaces import Choice
from pipelines import recipe as recipes
from pipelines import tag_names
from pipelines.interfaces import World
from pipelines.search import population
from pipelines.tracking.events import EventLog
from pipelines.training import checkpoints, worker
from pipelines.workflows import model_reference, search_board, services
from pipelines.workflows import trial as workflows_trial
from pipelines.workflows.context import Context

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def home(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    root = tmp_path / ".tessera"
    shutil.move(store, root)
    monkeypatch.setenv("TESSERA_HOME", str(root))
    return root


PBT = [*("--scheduler", "pbt"), *("--interval", "2"), *("--trials", "4"), *("--seed", "1")]
PBT += [*("--workers-per-trial", "0"), *("--set", "checkpoint.keep=9")]
PBT_SPACE = {
    "optim__model__lr": {"log_uniform": [1e-5, 0.1]},
    "optim__model__weight_decay": {"uniform": [0.0, 1e-3]},
}


def diverging_seed() -> int:
    """A seed for which the second trial diverges and then gets the learning rate of the other."""
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
    """The checkpoint of a trial after an epoch."""
    folder = folder_of(name) / "trials" / workflows_trial.run_name(name, member) / "checkpoints"
    for path in folder.glob("step-*"):
        if json.loads((path / "progress.json").read_text())["epoch"] == epoch:
            return path
    raise AssertionError(f"{member} has no checkpoint of epoch {epoch}")


def check_population(name: str) -> list[dict[str, Any]]:
    """Each trial has one run; its metrics have every epoch once, and its tags every change."""
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
        changes = json.loads(child.data.tags[tag_names.SETTINGS])
        assert changes == trial["changes"]
        assert changes[-1]["settings"] == trial["settings"]
        for path, first in changes[0]["settings"].items():
            assert json.loads(child.data.params[path]) == first
            points = client.get_metric_history(child.info.run_id, f"settings/{path}")
            expected = [
                [c["settings"][path] for c in changes if c["epoch"] <= e][-1]
                for e in range(1, EPOCHS + 1)
            ]
            assert [(p.step, p.value) for p in points] == list(enumerate(expected, 1))
        metrics = client.get_metric_history(child.info.run_id, "val/accuracy")
        assert [[p.step, p.value] for p in metrics] == trial["curve"]
    return list(standing)


def test_a_trial_copies_weights_and_continues_bit_for_bit(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a copy, the trial equals a training from the checkpoint of the donor with the new
    settings, bit for bit. With the old settings the result would differ."""
    space = write_space(tmp_path, **PBT_SPACE)
    arguments = ["cnn", "--data", str(digits), *SETTINGS, *PBT, "--space", space, "--refit"]
    assert tune.command.main([*arguments, "--json"], standalone_mode=False) == 0
    response = json.loads(capsys.readouterr().out)
    name = response["search"]
    standing = check_population(name)
    (taker,) = [t for t in standing if len(t["changes"]) > 1]
    donor = next(t for t in standing if t["id"] == taker["changes"][1]["donor"])
    assert dict(donor["curve"])[2] > dict(taker["curve"])[2]
    assert checkpoints.verify(checkpoint(name, donor["id"], 2)) == taker["changes"][1]["checkpoint"]

    def replay(settings: dict[str, Any], where: str) -> Any:
        folder = tmp_path / where
        source = checkpoint(name, donor["id"], 2)
        shutil.copytree(source, folder / "checkpoints" / source.name)
        search = search_board.find(Context.from_environment(), name)
        recipe = recipes.build(json.loads(search.recipe)).with_overrides(settings)
        payload = rank_work.payload_for(recipe, folder, changing=tuple(settings))
        detected = worker.run(payload, World(), EventLog(folder / "events.jsonl"))
        return load_file(folder / "checkpoints" / detected.newest / "weights.safetensors")

    reached = load_file(checkpoint(name, taker["id"], EPOCHS) / "weights.safetensors")
    same = replay(taker["settings"], "same")
    assert all(torch.equal(reached[key], same[key]) for key in reached)
    other = replay(donor["settings"], "other")
    assert not all(torch.equal(reached[key], other[key]) for key in reached)

    version = model_reference.resolve(
        services.open_registry(Context.from_environment()), response["model"]
    )
    winner = next(t for t in standing if t["id"] == response["winner"]["id"])
    assert version.tags["tessera.trial"] == winner["id"]
    assert response["refit"]["accuracy"] == pytest.approx(winner["value"], abs=1e-9)


def test_a_trial_that_diverges_copies_the_weights_of_another(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of 1e30 the loss is not finite. The trial copies weights and
    continues in the same run. Here each trial has a Ray Train worker."""
    space = write_space(tmp_path, optim__model__lr=[0.05, 1e30])
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--set", "train.epochs=2"]
    arguments += ["--scheduler", "pbt", "--trials", "2", "--seed", str(diverging_seed())]
    assert tune.command.main([*arguments, "--space", space, "--json"], standalone_mode=False) == 0
    response = json.loads(capsys.readouterr().out)
    good, bad = sorted(response["trials"], key=lambda t: len(t["changes"]))
    assert [c["settings"]["optim.model.lr"] for c in bad["changes"]] == [1e30, 0.05]
    assert bad["changes"][1]["donor"] == good["id"]
    assert [epoch for epoch, _ in good["curve"]] == [1, 2]
    assert [epoch for epoch, _ in bad["curve"]] == [2]
    assert bad["curve"][0] == good["curve"][1], "the same weights, settings and order"
    _, children = runs_of(response["search"])
    assert {child.info.status for child in children} == {"FINISHED"}
    assert len(children) == 2


def test_a_killed_population_resumes_with_the_same_result(
    home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver is killed in its second generation; its cluster keeps running. Random choices
    and deciding metrics are the same as without the kill."""
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
    search = search_board.find(Context.from_environment(), name)
    again = population.begin(search.parsed_space(), 4, search.seed)
    again.scores = {t["id"]: dict(t["curve"])[2] for t in standing}
    population.advance(again, search.parsed_space(), direction="max", seed=search.seed, epoch=3)
    assert {m.id: m.settings for m in again.members} == {t["id"]: t["settings"] for t in standing}
    assert again.donors == before.donors
