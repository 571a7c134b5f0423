"""A classifier that judges generated images: its predictions, invalid judges, and training a GAN
with it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gloo_ranks
import pytest
import rank_work
import torch
from safetensors.torch import load_file

import models
from models.core.errors import TesseraError
from models.core.family import BatchRng, DataSpec
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.interfaces import World
from pipelines.recipe import Recipe
from pipelines.tracking.events import EventLog, read_events
from pipelines.tracking.memory import MemoryRegistry
from pipelines.training import checkpoints, worker
from pipelines.training import judge as training_judge
from pipelines.training.checkpoints import Progress
from pipelines.training.run import JUDGE
from pipelines.training.setup import data_spec, open_setup
from pipelines.workflows import used_models

WORK = Path(__file__).parents[2] / "support" / "rank_work.py"
MADE = DataSpec("images", 1, 8, 8, (), (0.3,), (0.4,))
"""The data spec of a generator that is trained on the digits."""


def write(digits: Path, folder: Path, family: str = "cnn", **changes: Any) -> str:
    """Writes the files of a registered, untrained model; returns their digest."""
    recipe = recipes.start(family, "tiny").with_overrides({"data.path": str(digits), **changes})
    card = cards.read(digits)
    torch.manual_seed(5)
    module = models.get(family).build(recipe.config(), data_spec(recipe, card))
    path = checkpoints.save(
        folder.parent / f"{folder.name}-checkpoint",
        weights=module.state_dict(),
        training=None,
        optimizers={},
        recipe=recipe,
        card=card,
        progress=Progress(),
    )
    return checkpoints.write_model(path, folder)


@pytest.fixture(scope="module")
def judge_files(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("judge") / "model"
    return folder, write(digits, folder)


def images(count: int = 5, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, 1, side, side)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_probabilities_are_those_of_the_classifier(judge_files: tuple[Path, str]) -> None:
    folder, digest = judge_files
    features, probabilities = training_judge.open_judge(folder, digest, MADE, "cpu")(images())
    model = checkpoints.read_model(folder, digest)
    family, data = models.get("cnn"), data_spec(model.recipe, model.card)
    module = family.build(model.recipe.config(), data)
    module.load_state_dict(model.weights)
    seen = family.task.prepare(model.recipe.augment_settings(), data)(
        {"image": images()}, BatchRng(0, 5, slice(0, 5))
    )
    expected = family.predict(module.eval(), {**seen, "label": torch.zeros(5)})
    torch.testing.assert_close(probabilities, torch.stack([p["probabilities"] for p in expected]))
    # Features are what the head turns into logits.
    assert features.shape == (5, module.head.in_features)
    logits = torch.nn.functional.linear(features, module.head.weight, module.head.bias)
    torch.testing.assert_close(logits.softmax(1), probabilities)


@pytest.mark.parametrize("family", ["vit", "rnn", "resnet", "vgg", "googlenet", "densenet"])
def test_every_kind_of_classifier_has_features(family: str, digits: Path, tmp_path: Path) -> None:
    digest = write(digits, tmp_path / "model", family)
    judge = training_judge.open_judge(tmp_path / "model", digest, MADE, "cpu")
    features, probabilities = judge(images())
    assert probabilities.shape == (5, 10)
    assert features.ndim == 2
    assert features.shape[1] != 10
    alone, _ = judge(images()[2:3])
    torch.testing.assert_close(alone[0], features[2])


def test_a_network_that_ends_in_a_convolution(digits: Path, tmp_path: Path) -> None:
    changes = {"model.name": "squeezenet1_1", "data.height": 32, "data.width": 32}
    digest = write(digits, tmp_path / "model", "backbone", **changes)
    features, probabilities = training_judge.open_judge(tmp_path / "model", digest, MADE, "cpu")(
        images()
    )
    assert probabilities.shape == (5, 10)
    assert features.shape == (5, 512)


def test_images_of_another_size_are_scaled(judge_files: tuple[Path, str]) -> None:
    data = replace(MADE, height=16, width=16)
    judge = training_judge.open_judge(*judge_files, data, "cpu")
    large = images().repeat_interleave(2, 2).repeat_interleave(2, 3)
    grey = torch.full_like(large, 77)
    torch.testing.assert_close(judge(grey)[1], judge(grey[:, :, :8, :8])[1])
    assert judge(large)[1].shape == (5, 10)


def test_models_that_cannot_judge_are_refused(
    judge_files: tuple[Path, str], digits: Path, tmp_path: Path
) -> None:
    folder, digest = judge_files
    with pytest.raises(TesseraError, match="1 channels, these have 3"):
        training_judge.open_judge(folder, digest, replace(MADE, channels=3), "cpu")
    with pytest.raises(TesseraError, match="not those that were registered"):
        training_judge.open_judge(folder, "0" * 64, MADE, "cpu")
    other = write(digits, tmp_path / "gan", "dcgan")
    with pytest.raises(TesseraError, match="dcgan does generation and can't be a judge"):
        training_judge.open_judge(tmp_path / "gan", other, MADE, "cpu")
    with pytest.raises(TesseraError, match="manifest"):
        training_judge.open_judge(tmp_path / "absent", digest, MADE, "cpu")


@pytest.fixture
def registry(tmp_path: Path, judge_files: tuple[Path, str]) -> MemoryRegistry:
    registry = MemoryRegistry(tmp_path / "registry")
    folder, digest = judge_files
    registry.register("digits", folder, run_id="r", tags={"tessera.digest": digest}, step=1)
    return registry


def test_a_judge_is_fetched_once_and_completely(
    registry: MemoryRegistry, judge_files: tuple[Path, str], tmp_path: Path
) -> None:
    _, digest = judge_files
    recipe = recipes.start("dcgan", "tiny")
    used_models.fetch_judge(recipe, registry, tmp_path / "none")
    assert not (tmp_path / "none").exists(), "a recipe without a judge needs none"
    named = recipe.with_overrides({"judge": "models:/digits/1", "judge_digest": digest})
    used_models.fetch_judge(named, registry, tmp_path / "judge")
    assert checkpoints.verify(tmp_path / "judge") == digest
    before = (tmp_path / "judge").stat().st_mtime_ns
    used_models.fetch_judge(named, registry, tmp_path / "judge")
    assert (tmp_path / "judge").stat().st_mtime_ns == before
    other = named.with_overrides({"judge_digest": "0" * 64})
    with pytest.raises(TesseraError, match="not those that were registered"):
        used_models.fetch_judge(other, registry, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def gan(digits: Path, digest: str, **changes: Any) -> Recipe:
    return recipes.start("dcgan", "tiny").with_overrides(
        {
            "data.path": str(digits),
            "data.digest": cards.read(digits).digest,
            "judge": "models:/digits/1",
            "judge_digest": digest,
            "train.epochs": 2,
            "train.batch_size": 200,
            "train.ema": 0.9,
            "train.log_every_steps": 1,
            "checkpoint.every_steps": 5,
            "checkpoint.keep": 99,
            **changes,
        }
    )


def fit(recipe: Recipe, folder: Path, judge: Path) -> dict[str, Any]:
    """Trains in this process; returns the summary, all events and the last weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(judge, folder / JUDGE)
    emit = EventLog(folder / "events.jsonl")
    summary = worker.run(rank_work.payload_for(recipe, folder), World(), emit)
    emit.close()
    events = [event for event, _ in read_events(folder / "events.jsonl")]
    last = sorted(folder.glob("checkpoints/step-*"))[-1]
    weights = {
        file: {k: v.clone() for k, v in load_file(last / f"{file}.safetensors").items()}
        for file in ("weights", "training", "optimizer")
    }
    return {**dataclasses.asdict(summary), "events": events, "weights": weights}


@pytest.fixture(scope="module")
def trained(
    digits: Path, judge_files: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gan") / "whole"
    return folder, fit(gan(digits, judge_files[1]), folder, judge_files[0])


def logged(result: dict[str, Any]) -> list[dict[str, float]]:
    return [
        {k: v for k, v in e["values"].items() if "loss" in k}
        for e in result["events"]
        if e["kind"] == "metrics" and "train/generator/loss" in e["values"]
    ]


def test_a_training_of_two_parts(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, result = trained
    assert len(logged(result)) == 2 * 8
    assert set(logged(result)[0]) == {"train/generator/loss", "train/discriminator/loss"}
    assert {"frechet", "class_share_min", "confidence"} <= set(result["metrics"])
    rates = [k for e in result["events"] for k in e.get("values", {}) if "train/lr" in k]
    assert set(rates) == {"train/lr/generator", "train/lr/discriminator"}
    drawn = {path.stem for path in (folder / "pictures").rglob("*.png")}
    assert {"training_samples", "worst_mistakes", "val-00001", "val-00002"} <= drawn
    state = result["weights"]["optimizer"]
    assert {name.split("/")[0] for name in state} == {"generator", "discriminator"}


@pytest.mark.fault(18)
@pytest.mark.parametrize("step", [5, 8], ids=["mid-epoch", "at an epoch's end"])
def test_resume_of_two_parts_is_exact(
    step: int,
    trained: tuple[Path, dict[str, Any]],
    digits: Path,
    judge_files: tuple[Path, str],
    tmp_path: Path,
) -> None:
    folder, whole = trained
    name = f"checkpoints/step-{step:09d}"
    shutil.copytree(folder / name, tmp_path / "cut" / name)
    resumed = fit(gan(digits, judge_files[1]), tmp_path / "cut", judge_files[0])
    for file, tensors in whole["weights"].items():
        assert tensors.keys() == resumed["weights"][file].keys()
        assert all(torch.equal(t, resumed["weights"][file][k]) for k, t in tensors.items()), file
    assert logged(resumed) == logged(whole)[step:]
    assert resumed["metrics"] == whole["metrics"]


def test_accumulation_updates_both_parts_together(
    trained: tuple[Path, dict[str, Any]],
    digits: Path,
    judge_files: tuple[Path, str],
    tmp_path: Path,
) -> None:
    """The generator draws noise for each piece, so the losses differ, but only a little."""
    changes = {"train.accumulate": 3, "train.epochs": 1}
    cut = fit(gan(digits, judge_files[1], **changes), tmp_path, judge_files[0])
    assert len(logged(cut)) == 8
    first, expected = logged(cut)[0], logged(trained[1])[0]
    assert first == {name: pytest.approx(value, rel=0.1) for name, value in expected.items()}


@pytest.mark.slow
@pytest.mark.fault(15)
def test_a_rank_without_an_image_takes_part_in_every_update(
    digits: Path, judge_files: tuple[Path, str], tmp_path: Path
) -> None:
    """The last batch has one image for two ranks, so one of them counts none, in either part."""
    assert cards.read(digits).split("train").samples % 719 == 1
    shutil.copytree(judge_files[0], tmp_path / JUDGE)
    recipe = gan(digits, judge_files[1], **{"train.batch_size": 719, "train.epochs": 1})
    payload = {"recipe": recipe.to_json(), "run_dir": str(tmp_path)}
    result = gloo_ranks.run(WORK, "train", 2, payload)
    assert "error" not in result[0], result[0]
    assert result[0]["step"] == 3
    assert result[0]["metrics"]["frechet"] > 0
    losses = [
        event["values"]["train/discriminator/loss"]
        for event, _ in read_events(tmp_path / "events.jsonl")
        if "train/discriminator/loss" in event.get("values", {})
    ]
    assert len(losses) == 3
    assert all(0.5 < loss < 3 for loss in losses), "means are over the images that count"


@pytest.mark.slow
def test_metrics_do_not_depend_on_the_number_of_ranks(
    trained: tuple[Path, dict[str, Any]],
    digits: Path,
    judge_files: tuple[Path, str],
    tmp_path: Path,
) -> None:
    """On the train split: 1,439 images are six batches, the last one short."""
    last = sorted((trained[0] / "checkpoints").glob("step-*"))[-1]
    payload = {
        "model": str(tmp_path / "model"),
        "digest": checkpoints.write_model(last, tmp_path / "model"),
        "data": str(digits),
        "split": "train",
        "judge": str(judge_files[0]),
    }
    result = [gloo_ranks.run(WORK, "evaluate", size, payload)[0] for size in (1, 3)]
    assert result[0]["samples"] == cards.read(digits).split("train").samples
    assert result[0] == result[1]
    assert json.dumps(result[0]["metrics"], allow_nan=False)


def test_without_a_judge_the_training_is_refused(digits: Path) -> None:
    recipe = gan(digits, "", judge="")
    with pytest.raises(TesseraError, match=r"judged by a classifier.*--set judge="):
        open_setup(recipe)
