"""The recipe: one frozen tree, converted to and from JSON and YAML, and errors with a hint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.core.errors import UsageError
from pipelines import recipe as recipes


def test_round_trip_through_json_and_yaml(tmp_path: Path) -> None:
    recipe = recipes.start("cnn", "tiny").with_overrides({"optim.model.lr": 0.3, "seed": 7})
    assert recipes.build(json.loads(recipe.to_json())) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert recipes.read(file) == recipe
    assert recipes.read(file).to_json() == recipe.to_json()


def test_a_variant_has_its_own_settings_and_overrides_win() -> None:
    four = recipes.start("cnn", "four-conv")
    assert four.model["channels"] == (32, 64, 128, 128)
    assert (four.optim["model"].kind, four.optim["model"].lr) == ("sgd", 0.01)
    changed = four.with_overrides({"optim.model.lr": 0.5})
    assert changed.optim["model"].lr == 0.5
    assert changed.optim["model"].momentum == 0.9


def test_another_variant_changes_the_settings() -> None:
    changed = recipes.start("cnn", "four-conv").with_overrides({"variant": "keras-style"})
    assert changed == recipes.start("cnn", "keras-style")


@pytest.mark.parametrize(
    ("text", "value"),
    [("a.b=1e-3", 1e-3), ("a=[1, 2]", [1, 2]), ("a=true", True), ("a=x=y", "x=y"), ("a=", None)],
)
def test_overrides_from_the_command_line(text: str, value: object) -> None:
    assert recipes.parse_override(text)[1] == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim.model.lrr": 1}, "did you mean 'optim.model.lr'"),
        ({"train.epochs": "many"}, "train.epochs = 'many'"),
        ({"train.epochs": 0}, "train.epochs = 0"),
        ({"model.channels": "wide"}, "model.channels = 'wide'"),
        ({"variant": "bse"}, "did you mean 'base'"),
        ({"optim.model.lr": -1}, "optim.model.lr = -1"),
        ({"schedule.kind": "cosin"}, "schedule.kind = 'cosin'"),
    ],
)
def test_a_wrong_override_is_refused_with_a_hint(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipes.start("cnn").with_overrides(change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family: cnnn", "did you mean 'cnn'"),
        ("family: cnn\ntrian: {epochs: 3}", "did you mean 'train'"),
        ("family: cnn\ntrain: {epoch: 3}", "did you mean 'train.epochs'"),
        ("family: cnn\nmodel: {channel: 3}", "did you mean 'channels'"),
        ("family: cnn\noptim: {model: {learning_rate: 3}}", "optim.model.learning_rate"),
        ("variant: base", "names no family"),
        ("- 1", "is not a mapping of settings"),
        ("a: [", "is not valid YAML"),
        ("family: !!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_a_hint(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        recipes.read(file)
    assert message in str(caught.value)


def test_the_edges_are_only_cut_off_where_nothing_has_a_position() -> None:
    assert recipes.start("resnet").with_overrides({"data.fit": "resize_crop"})
    with pytest.raises(UsageError, match=r"data\.fit = resize_crop is not for detection"):
        recipes.start("yolo").with_overrides({"data.fit": "resize_crop"})


def test_the_tree_is_frozen_and_flat_is_complete() -> None:
    recipe = recipes.start("cnn")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    flat = recipe.flat()
    assert flat["optim.model.lr"] == json.dumps(recipe.optim["model"].lr)
    assert flat["family"] == "cnn"


def test_a_star_matches_any_name() -> None:
    changed = recipes.start("dcgan").with_overrides({"optim.*.lr": 0.5})
    assert len(changed.optim) == 2
    assert {part.lr for part in changed.optim.values()} == {0.5}


@pytest.mark.parametrize(
    ("given", "count", "smallest", "largest"),
    [
        (0, 0, 0, 0),
        (3, 3, 3, 3),
        ("3", 3, 3, 3),
        ("2:8", "2:8", 2, 8),
        ([2, 8], "2:8", 2, 8),
        ((4, 4), 4, 4, 4),
    ],
)
def test_workers_are_a_number_or_a_range(
    given: Any, count: Any, smallest: int, largest: int
) -> None:
    workers = recipes.start("cnn").with_overrides({"workers.count": given}).workers
    assert (workers.count, workers.smallest, workers.largest) == (count, smallest, largest)


@pytest.mark.parametrize("given", [-1, "two", "8:2", "0:4", "1:2:3", "2:", True, 2.5, []])
def test_other_counts_of_workers_are_refused(given: Any) -> None:
    with pytest.raises(UsageError, match=r"workers\.count.*such as 2:8"):
        recipes.start("cnn").with_overrides({"workers.count": given})


def test_a_range_in_yaml_is_no_number_of_base_60(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("family: cnn\nworkers: {count: 2:8}\n")
    recipe = recipes.read(file)
    assert recipe.workers.count == "2:8"
    assert recipes.parse_override("workers.count=2:8") == ("workers.count", "2:8")
    file.write_text(recipe.to_json())
    assert recipes.read(file) == recipe
