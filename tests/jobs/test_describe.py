"""`tessera describe`: every setting of every family, from its definition."""

from __future__ import annotations

import json

import pytest
from cli_runner import Call

import models
from pipelines import recipe as recipes
from pipelines.workflows import packaged_recipes
from pipelines.workflows.describe import attributes, describe, describe_recipe


@pytest.mark.parametrize("family", models.names())
def test_every_setting_is_described_with_type_and_default(family: str) -> None:
    found = describe(family)
    tree = dict(recipes.leaves(recipes.start(family).model_dump(mode="json")))
    settings = {one.path: one for one in found.settings}
    assert set(settings) == set(tree) - {"family", "variant"}
    assert all(one.default == tree[path] for path, one in settings.items())
    assert [one.path for one in found.settings if not one.type] == []
    assert [one.path for one in found.settings if not one.help] == []
    assert {variant.name for variant in found.variants} == set(models.get(family).variants)


def test_help_is_the_docstring_of_the_attribute_or_of_the_class() -> None:
    class Base:
        """`width` and `height`: in pixels. `depth`: blocks. Unknown is not described."""

        width: int = 1
        height: int = 1
        depth: int = 1
        unknown: int = 1

    class Derived(Base):
        depth: float = 2
        """Blocks, more
        or less."""

    found = attributes(Derived)
    assert found["width"] == ("int", "In pixels.")
    assert found["height"] == ("int", "In pixels.")
    assert found["depth"] == ("float", "Blocks, more or less.")
    assert found["unknown"] == ("int", "")


def test_text_and_json_have_the_same_content(call: Call) -> None:
    plain = json.loads(call("describe", "cnn", "--variant", "tiny", "--json").out)
    text = call("describe", "cnn", "--variant", "tiny").out
    assert "  schedule.kind = cosine  [constant | cosine | one_cycle | step]\n" in text
    assert all(f"  {one['path']} = " in text for one in plain["settings"])
    assert "tiny (shown below): model.channels=[8, 16]" in text
    assert "did you mean 'cnn'" in call("describe", "cn").err


@pytest.mark.parametrize("name", packaged_recipes.names())
def test_a_recipe_differs_from_its_family_in_what_its_file_sets(name: str) -> None:
    described = describe_recipe(name)
    assert described.data
    assert described.result.startswith("test ")
    assert described.duration
    default = recipes.start(described.family, described.variant)
    changes = {one.path: one.value for one in described.settings}
    expected = packaged_recipes.start(name).model_dump(mode="json")
    assert default.with_overrides(changes).model_dump(mode="json") == expected


def test_a_recipe_is_described_by_its_results_and_settings(call: Call) -> None:
    done = call("describe", "digits")
    assert "digits: a measured recipe of the family cnn\n" in done.out
    assert packaged_recipes.find("digits").result in done.out
    assert "  augment.crop_padding = 1  (default " in done.out
    assert "next: tessera train digits --data DIR" in done.err
    plain = json.loads(call("describe", "digits", "--json").out)
    assert plain["settings"][0].keys() == {"path", "value", "default"}
    assert "--variant is for a family" in call("describe", "digits", "--variant", "tiny").err
    assert "did you mean 'digits'" in call("describe", "digit").err
