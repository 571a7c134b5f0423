"""Evaluations of several models: the same with any number of ranks, and the report."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import gloo_ranks
import pytest
import rank_work
import torch

import models
from models.core.errors import UsageError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.evaluation import results
from pipelines.interfaces import World
from pipelines.promotion import policy
from pipelines.training import checkpoints, loaded_model
from pipelines.training.checkpoints import Progress
from pipelines.training.setup import data_spec

WORK = Path(rank_work.__file__)


def model(
    family: str, data: Path, folder: Path, *, seed: int = 0, epochs: int = 0
) -> dict[str, str]:
    """The files of a model as in a payload, untrained or trained for a few steps."""
    recipe = recipes.start(family, "tiny").with_overrides(
        {"data.path": str(data), "train.epochs": max(epochs, 1), "seed": seed}
    )
    if epochs:
        summary = rank_work.train(World(), {"recipe": recipe.to_json(), "run_dir": str(folder)})
        path = folder / "checkpoints" / summary["checkpoint"]
    else:
        card = cards.read(data)
        torch.manual_seed(seed)
        module = models.get(family).build(recipe.config(), data_spec(recipe, card))
        path = checkpoints.save(
            folder,
            weights=module.state_dict(),
            training=None,
            optimizers={},
            recipe=recipe,
            card=card,
            progress=Progress(),
        )
    files = folder / "model"
    return {
        "name": folder.name,
        "model": str(files),
        "digest": checkpoints.write_model(path, files),
    }


@pytest.fixture(scope="module")
def two(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    root = tmp_path_factory.mktemp("models")
    return [
        model("cnn", digits, root / "good <b>", epochs=4),
        model("cnn", digits, root / "poor", seed=1),
    ]


def payload(digits: Path, two: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    return {"models": two, "data": str(digits), "split": "test", **more}


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_ranks(
    digits: Path, two: list[dict[str, str]]
) -> None:
    request = payload(digits, two, robustness=40)
    result = [gloo_ranks.run(WORK, "evaluate_models", size, request)[0] for size in (1, 2)]
    assert result[0]["models"] == result[1]["models"]
    assert result[0] == result[1]
    good, poor = (results.read_result(one) for one in result[0]["models"])
    assert good.samples == poor.samples == cards.read(digits).split("test").samples
    accuracy = good.metrics["accuracy"]
    assert 0.6 < accuracy.low < accuracy.value < accuracy.high <= 1
    compared = results.read_comparison(result[0]["comparisons"][0])
    lead = compared.metrics["accuracy"]
    assert lead.value == pytest.approx(accuracy.value - poor.metrics["accuracy"].value)
    assert lead.low > 0.3
    assert compared.mcnemar is not None
    assert compared.mcnemar.p_value < 1e-6
    images = sum(part.samples for part in good.slices if part.by == "brightness")
    assert images == good.samples
    assert good.robustness is not None
    assert good.robustness.samples == 40
    assert good.robustness.clean > 0.6
    worst = min(values[-1] for values in good.robustness.corrupted.values())
    assert worst < good.robustness.clean
    assert good.robustness.attacked["pgd_8"] < good.robustness.clean


@pytest.mark.slow
def test_a_report_opens_offline_and_has_no_scripts(
    digits: Path, two: list[dict[str, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    request = payload(digits, two, robustness=20, costs=True, report=str(folder))
    result = rank_work.evaluate_models(World(), request)
    assert json.loads((folder / "report.json").read_text()) == result
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page), (
        "nothing is loaded from elsewhere"
    )
    assert "good <b>" not in page
    assert html.escape("good <b>") in page, "names come from users"
    assert "default-src 'none'" in page
    images = sorted(path.name for path in (folder / "pictures").iterdir())
    assert images == [
        f"{name}-{number}.png"
        for name in ("charts", "confusion_matrix", "worst_mistakes")
        for number in (1, 2)
    ]
    value = result["models"][0]["metrics"]["accuracy"]["value"]
    assert f"{value:.4g}" in page
    costs = result["models"][0]["costs"]
    assert costs.keys() == policy.COSTS, "a policy that limits another one could never be measured"
    assert costs["latency_p50_ms"] <= costs["latency_p95_ms"]
    assert costs["size_bytes"] == sum(
        path.stat().st_size for path in Path(two[0]["model"]).rglob("*") if path.is_file()
    )


def test_metadata_fields_define_slices(digits: Path, two: list[dict[str, str]]) -> None:
    number = cards.read(digits).split("test").samples
    loader = loaded_model.load_model(
        Path(two[0]["model"]), two[0]["digest"], str(digits), World()
    ).loader("test", World())
    keys = [key for _, batch in loader.batches() for key in batch["key"]]
    assert len(keys) == number
    fields = {
        "half": {key: "first" if position < 50 else "rest" for position, key in enumerate(keys)}
    }
    result = rank_work.evaluate_models(World(), payload(digits, two[:1], fields=fields))["models"][
        0
    ]
    sizes = {part["name"]: part["samples"] for part in result["slices"] if part["by"] == "half"}
    assert sizes == {"first": 50, "rest": number - 50}


def test_models_of_different_tasks_are_not_compared(
    digits: Path, two: list[dict[str, str]], tmp_path: Path
) -> None:
    other = model("autoencoder", digits, tmp_path / "other")
    with pytest.raises(UsageError, match="no metric in common"):
        rank_work.evaluate_models(World(), payload(digits, [two[0], other], intervals=False))


def test_a_target_that_is_the_image_is_not_corrupted(digits: Path, tmp_path: Path) -> None:
    request = payload(digits, [model("autoencoder", digits, tmp_path / "one")], robustness=20)
    result = rank_work.evaluate_models(World(), {**request, "intervals": False})["models"][0]
    assert result["robustness"] is None


@pytest.mark.slow
def test_results_survive_json(digits: Path, two: list[dict[str, str]]) -> None:
    result = rank_work.evaluate_models(World(), payload(digits, two, robustness=10))
    for one in result["models"]:
        assert json.loads(json.dumps(results.to_plain(results.read_result(one)))) == one
    (compared,) = result["comparisons"]
    assert json.loads(json.dumps(results.to_plain(results.read_comparison(compared)))) == compared
