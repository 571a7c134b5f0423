"""Population based training on a real Ray with a real MLflow.

One population has a trial that diverges, which copies the weights of another; its driver is killed
in the second generation, and it is resumed.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from searches import (
    EPOCHS,
    SETTINGS,
    TWO_AT_ONCE,
    folder_of,
    runs_of,
    start,
    wait_for,
    write_space,
)

from jobs import tune
from models.core.spaces import Choice, Space, Uniform
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


LR, DECAY = "optim.model.lr", "optim.model.weight_decay"
RATES = [0.05, 0.04, 0.02, 1e30]
"""With the last one the loss is not finite."""


def diverging_seed(space: dict[str, Space], count: int) -> int:
    """A seed for which the last trial diverges and no other, and does not diverge again with its
    new settings, whichever trial it copies."""
    for seed in range(1000):
        first = population.begin(space, count, seed).members
        if [m.settings[LR] > 1 for m in first] != [False] * (count - 1) + [True]:
            continue
        after = []
        for best in first[:-1]:
            people = population.begin(space, count, seed)
            people.scores = {m.id: float(m.id == best.id) for m in first[:-1]}
            people.scores[first[-1].id] = None
            population.advance(people, space, direction="max", seed=seed, epoch=3)
            after.append(people.members[-1].settings[LR])
        if max(after) < 1:
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
    """Each trial has one run; its metrics have every epoch once, and its tags every change. The
    trial that diverged has no metrics of its first generation."""
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
        began = 1 if len(trial["changes"]) == 1 else 3
        assert [epoch for epoch, _ in trial["curve"]] == list(range(began, EPOCHS + 1))
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


@dataclass(frozen=True)
class Resumed:
    """A population that was killed and resumed to its end. `before` is its state when killed."""

    name: str
    before: population.Population
    trials: list[dict[str, Any]]
    response: dict[str, Any]


@pytest.fixture(scope="module")
def resumed(own_home: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """The driver is killed in its second generation; its cluster keeps running."""
    import ray

    space: dict[str, Space] = {LR: Choice(tuple(RATES)), DECAY: Uniform(0.0, 1e-3)}
    file = write_space(
        tmp_path_factory.mktemp("space"),
        optim__model__lr=RATES,
        optim__model__weight_decay={"uniform": [0.0, 1e-3]},
    )
    words = [sys.executable, "-m", "jobs.tune", "cnn", "--data", str(digits), *SETTINGS]
    words += ["--scheduler", "pbt", "--interval", "2", "--trials", "4", "--space", file]
    words += ["--workers-per-trial", "0", "--set", "checkpoint.keep=9", *TWO_AT_ONCE]
    words += ["--seed", str(diverging_seed(space, 4))]
    process = start(words, {"RAY_ADDRESS": ray.get_runtime_context().gcs_address})

    def generation() -> list[int]:
        files = Context.from_environment().searches_dir.glob("*/population.json")
        return [json.loads(file.read_text())["generation"] for file in files]

    wait_for(process, lambda: generation() == [1])
    process.send_signal(signal.SIGKILL)
    process.wait()
    (name,) = [path.name for path in Context.from_environment().searches_dir.iterdir()]
    before = population.read(folder_of(name) / "population.json")
    assert before is not None
    ran = CliRunner().invoke(tune.command, ["--resume", name, "--refit", "--json"])
    assert ran.exit_code == 0, ran.output
    return Resumed(name, before, check_population(name), json.loads(ran.stdout))


@pytest.mark.cluster
def test_a_killed_population_resumes_with_the_same_result(resumed: Resumed) -> None:
    """Random choices and deciding metrics are the same as without the kill."""
    assert resumed.before.donors
    assert len(resumed.before.scores) < 4
    search = search_board.find(Context.from_environment(), resumed.name)
    again = population.begin(search.parsed_space(), 4, search.seed)
    again.scores = {t["id"]: dict(t["curve"]).get(2) for t in resumed.trials}
    population.advance(again, search.parsed_space(), direction="max", seed=search.seed, epoch=3)
    assert {m.id: m.settings for m in again.members} == {
        t["id"]: t["settings"] for t in resumed.trials
    }
    assert again.donors == resumed.before.donors


def test_a_trial_that_diverged_copies_weights_and_continues_bit_for_bit(
    resumed: Resumed, tmp_path: Path
) -> None:
    """After the copy, the trial equals a training from the checkpoint of the donor with the new
    settings, bit for bit. With the old settings the result would differ."""
    name = resumed.name
    (taker,) = [t for t in resumed.trials if len(t["changes"]) > 1]
    assert [change["settings"][LR] > 1 for change in taker["changes"]] == [True, False]
    donor = next(t for t in resumed.trials if t["id"] == taker["changes"][1]["donor"])
    assert dict(donor["curve"])[2] == max(dict(t["curve"]).get(2, 0) for t in resumed.trials)
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


def test_the_best_trial_of_a_population_is_registered(resumed: Resumed) -> None:
    version = model_reference.resolve(
        services.open_registry(Context.from_environment()), resumed.response["model"]
    )
    winner = next(t for t in resumed.trials if t["id"] == resumed.response["winner"]["id"])
    assert version.tags["tessera.trial"] == winner["id"]
    assert resumed.response["refit"]["accuracy"] == pytest.approx(winner["value"], abs=1e-9)


@pytest.mark.cluster
def test_a_trial_on_ray_train_that_diverges_copies_the_weights_of_another(
    own_home: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As above, but each trial has a Ray Train worker: four groups of them."""
    seed = diverging_seed({LR: Choice((0.05, 1e30))}, 2)
    space = write_space(tmp_path, optim__model__lr=[0.05, 1e30])
    arguments = ["cnn", "--data", str(digits), *SETTINGS, "--set", "train.epochs=2"]
    arguments += ["--scheduler", "pbt", "--trials", "2", "--seed", str(seed)]
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
