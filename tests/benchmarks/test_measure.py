"""The comments of recipes and the tables in README and the docs are generated from the results."""

from __future__ import annotations

import importlib.util
import re
import statistics
from pathlib import Path

import pytest

import models
from pipelines import recipe as recipes
from pipelines.data.packing import pack

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("measure", ROOT / "benchmarks" / "measure.py")
assert _spec is not None
assert _spec.loader is not None
measure = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(measure)
RECIPES = sorted(p.relative_to(ROOT) for p in (ROOT / "jobs" / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_comment_of_a_recipe_is_the_generated_one(path: Path) -> None:
    entry = measure.read_results()[path.stem]
    assert path.read_text() == measure.comment(path, entry) + measure.body(path)
    assert len(entry["values"]) >= 3
    recipe = recipes.read(path)
    assert (recipe.family, recipe.variant) == (entry["family"], entry["variant"])


@pytest.mark.parametrize(
    ("name", "metric", "bar"),
    [
        ("digits", "accuracy", 0.97),
        ("mnist", "accuracy", 0.99),
        ("cifar10-airbench", "accuracy", 0.90),
        ("bccd-yolo", "map50", 0.80),
        ("nuclei-mask-rcnn", "mask_map50", 0.60),
        ("isbi-unet", "pixel_accuracy", 0.90),
        ("isbi-unet", "miou", 0.75),
        ("set5-super-resolution", "psnr_gain", 2.0),
        ("mnist-rnn", "accuracy", 0.98),
        ("mnist-vit", "accuracy", 0.97),
        ("mnist-dcgan", "class_share_min", 0.04),
        ("mnist-embedding", "few_shot_5", 0.85),
    ],
)
def test_metrics_reach_their_bars(name: str, metric: str, bar: float) -> None:
    assert mean(name, metric) >= bar


@pytest.mark.parametrize(
    ("name", "metric", "share", "of"),
    [
        ("mnist-embedding", "eer", 0.15, None),
        ("mnist-autoencoder", "mse", 0.6, r"32 principal components: mse ([\d.]+)"),
        ("mnist-dcgan", "frechet", 0.1, r"before it is trained: frechet ([\d.]+)"),
    ],
)
def test_errors_stay_below_their_bars(name: str, metric: str, share: float, of: str | None) -> None:
    """At most `share`, or at most this share of a measured reference."""
    bar = share
    if of:
        (text,) = measure.references(Path(f"{name}.yaml"))
        match = re.search(of, text)
        assert match, text
        bar *= float(match[1])
    assert mean(name, metric) <= bar


def mean(name: str, metric: str) -> float:
    entry = measure.read_results()[name]
    metrics = {
        entry["metric"].removeprefix("test "): entry["values"],
        **entry.get("other_metrics", {}),
    }
    return float(statistics.mean(metrics[metric]))


def test_every_training_takes_at_most_half_an_hour() -> None:
    slowest = {path: max(entry["seconds"]) for path, entry in measure.read_results().items()}
    assert {path: seconds for path, seconds in slowest.items() if seconds > 30 * 60} == {}


def test_every_family_has_a_measured_recipe() -> None:
    measured = {entry["family"] for entry in measure.read_results().values()}
    assert set(models.names()) - measured == set()


def test_docs_contain_a_row_for_every_recipe() -> None:
    assert measure.table(measure.read_results()) in measure.MEASURED.read_text()


def test_readme_contains_the_best_result_of_each_task_and_data_set() -> None:
    best = measure.best_results(measure.read_results())
    assert len(best) == 11
    assert best["mnist"]["family"] == "cnn"
    assert measure.table(best) in measure.README.read_text()


def test_a_changed_result_changes_the_tables() -> None:
    results = measure.read_results()
    entry = results["mnist"]
    entry["values"] = [v - 0.0001 for v in entry["values"]]
    assert measure.table(measure.best_results(results)) not in measure.README.read_text()
    assert measure.table(results) not in measure.MEASURED.read_text()


@pytest.mark.slow
def test_the_digits_are_packed_to_the_bytes_that_were_measured(tmp_path: Path) -> None:
    """A change of code must not change the bytes of a data set, nor its digest."""
    card = pack.pack("digits", tmp_path / "digits")
    assert card.digest == measure.read_results()["digits"]["data_digest"]


def test_mean_and_sample_deviation() -> None:
    assert measure.mean_and_deviation([0.9, 0.92, 0.94]) == "0.9200 ± 0.0200"
    assert measure.mean_and_deviation([0.5]) == "0.5000 ± 0.0000"
    assert measure.mean_and_deviation([0.00341, 0.00343]) == "0.003420 ± 0.000014"
    assert measure.mean_and_deviation([36.8, 36.9]) == "36.8500 ± 0.0707"
    assert measure.mean_and_deviation([0.0, 0.0]) == "0.0000 ± 0.0000"
