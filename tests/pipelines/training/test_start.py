"""Trainings that begin with a registered version: what is copied, and what stays new."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.training import checkpoints
from pipelines.training.checkpoints import Model
from pipelines.training.setup import TrainingSetup
from pipelines.training.start import begin_with
from pipelines.workflows import services, train
from pipelines.workflows.context import Context

BEFORE, NOW = ("cat", "dog", "owl"), ("owl", "fox", "cat", "hen")


def spec(name: str, classes: tuple[str, ...]) -> DataSpec:
    reads = models.get(name).task.reads
    return DataSpec(reads, 3, 64, 64, classes, (0.5,) * 3, (0.2,) * 3, (9,) * len(classes))


def trained(name: str, classes: tuple[str, ...], seed: int) -> tuple[Model, Any]:
    """A version with random weights, and a setup with a new network for `classes`."""
    recipe = recipes.start(name, "tiny").with_overrides({"start_from": "models:/pets/1"})
    torch.manual_seed(seed)
    module = models.get(name).build(recipe.config(), spec(name, classes))
    card: Any = SimpleNamespace(classes=classes)
    version = Model(module.state_dict(), recipe, card, "")
    card = cards.Card.model_construct(classes=classes)
    return version, TrainingSetup(recipe, models.get(name), card, spec(name, classes))


@pytest.mark.parametrize(
    "name", ["cnn", "resnet", "vit", "efficientnet", "unet", "yolo", "airbench"]
)
def test_classes_keep_their_part_of_the_head(name: str) -> None:
    version, _ = trained(name, BEFORE, 1)
    new, setup = trained(name, NOW, 2)
    module = setup.build_module()
    module.load_state_dict(new.weights)
    started = begin_with(version, module, setup)
    assert started.classes == ("owl", "cat")
    assert started.fresh, "fox and hen are new"
    state = module.state_dict()
    for tensor in started.fresh:
        old, fresh = version.weights[tensor], new.weights[tensor]
        for place, label in enumerate(NOW):
            expected = old[BEFORE.index(label)] if label in BEFORE else fresh[place]
            assert torch.equal(state[tensor][place], expected)
    body = state.keys() - set(started.fresh)
    assert all(torch.equal(state[n], version.weights[n]) for n in body if "num_batches" not in n)


@pytest.mark.parametrize("name", [n for n in models.names() if n != "embedding"])
def test_the_same_classes_copy_everything(name: str) -> None:
    version, setup = trained(name, BEFORE, 1)
    module = setup.build_module()
    started = begin_with(version, module, setup)
    assert started.fresh == ()
    state = module.state_dict()
    assert all(torch.equal(state[n], t) for n, t in version.weights.items() if "num_" not in n)


def test_classes_in_another_order_are_found_by_name() -> None:
    version, _ = trained("cnn", BEFORE, 1)
    _, setup = trained("cnn", BEFORE[::-1], 2)
    module = setup.build_module()
    assert begin_with(version, module, setup).fresh == ()
    image = torch.rand(2, 3, 64, 64)
    before = models.get("cnn").build(version.recipe.config(), spec("cnn", BEFORE))
    before.load_state_dict(version.weights)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(image), before.eval()(image).flip(1))


def test_another_network_is_refused() -> None:
    version, _ = trained("cnn", BEFORE, 1)
    _, setup = trained("cnn", BEFORE, 2)
    wider = setup.recipe.with_overrides({"model.convs": 3})
    setup = dataclasses.replace(setup, recipe=wider)
    with pytest.raises(TesseraError, match=r"models:/pets/1 is another network: it differs in"):
        begin_with(version, setup.build_module(), setup)


@pytest.mark.slow
def test_a_training_begins_with_a_registered_version(digits: Path, own_home: Path) -> None:
    context = Context.from_environment()
    changes: dict[str, Any] = {"train.epochs": 3, "workers.count": 0}
    options: dict[str, Any] = {"data": digits, "variant": "tiny", "progress": False}
    first = train.train("cnn", set=changes, **options)
    again = {
        **changes,
        "train.epochs": 1,
        "optim.model.lr": 1e-6,
        "start_from": "digits@challenger",
    }
    second = train.train("cnn", set=again, **options)
    assert second.metrics["accuracy"] == pytest.approx(first.metrics["accuracy"], abs=0.02)
    fresh = train.train("cnn", set={**again, "start_from": ""}, **options)
    assert fresh.metrics["accuracy"] < first.metrics["accuracy"] - 0.3, "the control"
    registry = services.open_registry(context)
    recipe = second.run.recipe()
    assert recipe.start_from == f"models:/digits/{first.version.number}"
    assert recipe.start_from_digest == services.registered_digest(
        registry.version("digits", first.version.number)
    )
    assert checkpoints.read_identity(second.run.folder / "start")[0].family == "cnn"
    with pytest.raises(UsageError, match=r"is a cnn, and a resnet can't begin with it"):
        train.train("resnet", set={**again, "start_from": "digits/1"}, **options)
