"""Recipes with measured results are used by name, without a path."""

from __future__ import annotations

from pathlib import Path

import pytest

import models
from models.core.errors import UsageError
from pipelines import recipe as recipes
from pipelines.workflows import packaged_recipes


def test_every_recipe_is_listed_with_its_measured_result() -> None:
    for name in packaged_recipes.names():
        recipe = packaged_recipes.find(name)
        assert recipe.file.is_file()
        assert recipe.family == recipes.read(recipe.file).family
        assert recipe.result.startswith("test ")
        assert "±" in recipe.result
        assert recipe.duration.endswith(" s")
        assert recipe.data


def test_no_recipe_has_the_name_of_a_family() -> None:
    """The family would take precedence, and the recipe could only be used by its path."""
    assert set(packaged_recipes.names()) & set(models.names()) == set()


def test_a_training_starts_from_a_family_a_packaged_recipe_or_a_file(tmp_path: Path) -> None:
    assert packaged_recipes.start("cnn", "tiny") == recipes.start("cnn", "tiny")
    digits = packaged_recipes.start("digits")
    assert digits == recipes.read(packaged_recipes.find("digits").file)
    assert digits.train.epochs == 30
    (tmp_path / "own.yaml").write_text("family: cnn\ntrain: {epochs: 2}\n")
    assert packaged_recipes.start(str(tmp_path / "own.yaml")).train.epochs == 2


@pytest.mark.parametrize(
    ("what", "variant", "message"),
    [
        ("digit", None, "unknown family or recipe 'digit'. did you mean 'digits'?"),
        ("resnett", None, "did you mean 'resnet'?"),
        ("digits", "tiny", "--variant is for a family"),
        ("none.yaml", None, "none.yaml can't be read"),
    ],
)
def test_a_name_that_is_neither_is_refused(what: str, variant: str | None, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        packaged_recipes.start(what, variant)
    assert message in str(refused.value)
