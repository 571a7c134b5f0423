"""A generator from end to end: trained with a judge, evaluated, promoted, used to generate images.

With a real MLflow, in this process.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from cli_runner import Call
from PIL import Image

from pipelines.promotion import champions
from pipelines.training import checkpoints
from pipelines.training.run import JUDGE
from pipelines.workflows import services
from pipelines.workflows.context import Context

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "initial_frechet.py"
pytestmark = pytest.mark.slow
SMALL = ("--variant", "tiny", "--workers", "0", "--set", "train.epochs=1", "--json")


def test_a_generator_is_trained_evaluated_promoted_and_used(
    call: Call,
    digits: Path,
    store: Path,
    trained_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(store))
    quick = ("--set", "train.ema=0", "--set", "optim.generator.lr=0.01")  # or all it makes is grey
    gan = ("train", "dcgan", "--data", digits, *SMALL, *quick)
    refused = call(*gan)
    assert refused.status == 2
    assert "--set judge=models:/" in refused.err
    absent = call(*gan, "--set", "judge=models:/nobody")
    assert absent.status == 1
    assert "no model is registered yet" in absent.err
    assert not list(Context.from_environment().runs_dir.glob("dcgan-*")), (
        "what is refused leaves nothing behind"
    )

    monkeypatch.setenv("TESSERA_HOME", str(trained_home))  # it has version 1 of `digits`
    assert call("train", "cnn", "--data", digits, *SMALL).status == 0
    made = json.loads(call(*gan, "--set", "judge=models:/digits").out)
    assert made["model"] == "models:/digits-generation/1"
    registry = services.open_registry(Context.from_environment())
    version = registry.version("digits-generation", 1)
    recipe = json.loads(version.tags["tessera.recipe"])
    judge = registry.version("digits", 2)
    assert recipe["judge"] == "models:/digits/2", "the newest, by its number from now on"
    assert recipe["judge_digest"] == judge.tags["tessera.digest"]
    assert version.tags["tessera.servable"].startswith("no: a prediction of dcgan")
    (folder,) = Context.from_environment().runs_dir.glob("dcgan-*")
    assert checkpoints.verify(folder / JUDGE) == recipe["judge_digest"]

    done = call("evaluate", "digits-generation", "--data", digits, "--json")
    assert done.status == 0, done.err
    (evaluation,) = json.loads(done.out)["models"]
    assert evaluation["judge_digest"] == recipe["judge_digest"]
    metrics = {name: one["value"] for name, one in evaluation["metrics"].items()}
    assert metrics["frechet"] > 0
    assert call("promote", "digits-generation/1").status == 0

    # By another judge, in another run: no comparison.
    other = call(*gan, "--set", "judge=models:/digits/1")
    assert other.status == 0, other.err
    assert call("evaluate", "digits-generation/2", "--data", digits).status == 0
    verdict = call("promote", "digits-generation/2")
    assert verdict.status == 1
    assert "its judge differs from that of the champion" in verdict.out
    champion = champions.current_champion(registry, "digits-generation")
    assert champion is not None
    assert champion.number == 1

    _ask(call, tmp_path, digits)
    _compare_with_the_beginning(digits, metrics)
    resumed = call("train", "--resume", folder.name, "--workers", "0", "--json")
    assert json.loads(resumed.out)["model"] == "models:/digits-generation/1"
    shutil.rmtree(folder / JUDGE)
    assert call("train", "--resume", folder.name, "--workers", "0", "--json").status == 0


def _ask(call: Call, tmp_path: Path, digits: Path) -> None:
    model = "models:/digits-generation@champion"
    files = ("--results", tmp_path / "results", "--annotated", tmp_path / "annotated")
    lines = [
        json.loads(line) for line in call("predict", model, "--samples", 3, *files).out.splitlines()
    ]
    assert [a["sample"] for a in lines] == [0, 1, 2]
    assert all((a["height"], a["width"], a["seed"]) == (8, 8, 0) for a in lines)
    images = [(tmp_path / "results" / a["result"]).read_bytes() for a in lines]
    assert len(set(images)) == 3
    with Image.open(tmp_path / "results" / lines[0]["result"]) as image:
        assert (image.size, image.mode) == ((8, 8), "L")
    assert all((tmp_path / "annotated" / a["annotated"]).stat().st_size for a in lines)
    for options, same in (((), True), (("--seed", 1), False)):
        again = call("predict", model, "--samples", 1, *options, "--results", tmp_path / "again")
        name = json.loads(again.out)["result"]
        assert ((tmp_path / "again" / name).read_bytes() == images[0]) is same
    about = call("predict", model, digits)
    assert about.status == 2
    assert "say how many: --samples" in about.err
    assert call("predict", "models:/digits", "--samples", 3).status == 2


def _compare_with_the_beginning(digits: Path, metrics: dict[str, float]) -> None:
    spec = importlib.util.spec_from_file_location("initial_frechet", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    frechet = module.initial_frechet("models:/digits-generation/1", str(digits))
    assert frechet["trained"] == metrics
    assert frechet["initial"]["frechet"] > 0
    assert frechet["initial"] != metrics
    assert frechet["share"] == metrics["frechet"] / frechet["initial"]["frechet"]
