"""`prepare` refuses what can't be trained before anything is created."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.cluster.connection import Resources
from pipelines.data import card as cards
from pipelines.recipe import Recipe
from pipelines.training import setup as training_setup
from pipelines.training.setup import TrainingSetup, open_setup, prepare


def recipe_for(digits: Path, family: str = "cnn", **changes: Any) -> Recipe:
    return recipes.start(family, "tiny").with_overrides({"data.path": str(digits), **changes})


def test_the_setup_has_the_digest_and_reads_the_card_once(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    usual = cards.read
    monkeypatch.setattr(cards, "read", lambda where: read.append(where) or usual(where))
    setup = prepare(recipe_for(digits))
    assert read == [str(digits)]
    assert setup.recipe.data.digest == setup.card.digest
    assert setup.data.shape == (1, 8, 8)
    assert TrainingSetup.of(setup.recipe, setup.card) == setup
    assert len(read) == 1, "a worker's setup reads nothing"


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("backbone", {"model.name": "nonsense"}, "network.*nonsense"),
        ("backbone", {"model.name": "vit_b_16"}, "vit_b_16.*8x8"),
        ("resnet", {"model.freeze": "backbone"}, "model.freeze.*weights"),
        ("resnet", {"model.weights": "/nowhere/w.safetensors"}, "can't be read"),
        ("resnet", {"model.weights": "w.zip"}, "w.zip"),
        ("cnn", {"train.batch_size": 1, "workers.count": 2}, "can't be split over 2 workers"),
        ("cnn", {"data.digest": "0" * 64}, "not the one that the recipe names"),
        ("unet", {}, "the data set is one of classification"),
        ("dcgan", {}, "the recipe names none"),
    ],
)
def test_recipes_that_cannot_be_trained_are_refused(
    family: str, changes: dict[str, Any], message: str, digits: Path
) -> None:
    with pytest.raises(TesseraError, match=message):
        prepare(recipe_for(digits, family, **changes))


def test_weights_of_another_network_are_refused(digits: Path, tmp_path: Path) -> None:
    weights = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(64, 1, 3, 3)}, weights)
    recipe = recipe_for(digits, "resnet", **{"model.weights": str(weights)})
    with pytest.raises(TesseraError, match="of another network: missing"):
        prepare(recipe)
    assert prepare(recipe, check_weights=False).recipe.model["weights"] == str(weights)


def test_workers_that_do_not_fit_are_refused(digits: Path) -> None:
    recipe = recipe_for(digits, **{"workers.count": 64})
    with pytest.raises(TesseraError, match=r"64 workers with 1 CPU each.*there are 2 CPUs"):
        prepare(recipe, resources=Resources(cpus=2))
    assert prepare(recipe, resources=Resources(cpus=64)).card
    assert prepare(recipe).card, "the resources of another cluster aren't known yet"
    gpus = recipe_for(digits, **{"workers.count": 2, "workers.gpus": 1})
    with pytest.raises(TesseraError, match=r"2 workers with 1 GPU each.*there are 1 GPUs"):
        prepare(gpus, resources=Resources(cpus=2, gpus=1))


def test_a_network_that_reads_its_weights_is_built_on_the_cpu(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its constructor can't run on the meta device; only an error on the CPU counts."""
    setup = open_setup(recipe_for(digits))
    devices: list[str] = []
    usual = type(setup.family).build

    def build(self: Any, config: Any, data: Any) -> nn.Module:
        module = usual(self, config, data)
        parameter = next(module.parameters())
        devices.append(parameter.device.type)
        assert parameter.flatten()[0].item() < 1e9
        return module

    monkeypatch.setattr(type(setup.family), "build", build)
    before = torch.get_rng_state()
    training_setup.check_network(setup)
    assert devices == ["meta", "cpu"]
    assert torch.equal(before, torch.get_rng_state()), "the random state stays as it was"


def test_any_error_of_a_constructor_is_refused_with_its_type(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = open_setup(recipe_for(digits))

    def build(self: Any, config: Any, data: Any) -> nn.Module:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(type(setup.family), "build", build)
    with pytest.raises(TesseraError, match=r"cnn can't be built.*8x8.*ZeroDivisionError"):
        training_setup.check_network(setup)
