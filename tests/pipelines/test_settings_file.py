"""The reader of recipes, spaces and policies: what it accepts, and that everything else is one line
within a second."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.core.errors import UsageError
from pipelines import recipe as recipes
from pipelines import settings_file
from pipelines.promotion import policy
from pipelines.search import space as search_space

READERS: list[Callable[[Path], Any]] = [recipes.read, search_space.read_space, policy.read]

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{','.join(['*' + chr(97 + i)] * 9)}]}}\n"
    for i in range(9)
)
BAD = {
    "alias bomb": BOMB,
    "merge bomb": MERGES,
    "ten megabytes": "family: cnn\n# " + "x" * 10_000_000,
    "many values": "a: [" + "1," * 60_000 + "]",
    "deep lists": "a: " + "[" * 20_000,
    "deep mappings": "".join("  " * n + "a:\n" for n in range(300)),
    "alias to itself": "a: &a [*a]",
    "a list": "- family: cnn",
    "a number": "7",
    "a date": "2024-01-01",
    "text": "cnn",
    "a key that is a number": "family: cnn\n1: 2",
    "a key that is nothing": "family: cnn\n~: 2",
    "a key that is a list": "? [1, 2]\n: 3",
    "a duplicate key": "family: cnn\nfamily: unet",
    "a tag": "family: !!python/object/apply:os.system ['true']",
    "a set": "family: !!set {cnn}",
    "binary": "family: !!binary aGVsbG8=",
    "two documents": "family: cnn\n---\nfamily: cnn",
    "a huge number": "seed: " + "9" * 100_000,
    "cut": "family: [",
    "a tab": "family:\n\t- cnn",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line_within_a_second(
    tmp_path: Path, name: str, reader: Callable[[Path], Any]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(BAD[name])
    began = time.process_time()
    with pytest.raises(UsageError) as caught:
        reader(file)
    assert time.process_time() - began < 1
    assert "\n" not in caught.value.message
    assert str(file) in caught.value.message
    assert len(caught.value.message) < 400 + len(str(file))


def test_the_control_reads_the_bomb_without_limits() -> None:
    """Without a limit PyYAML builds the bomb: its parts are shared, and printing it never ends."""
    small = yaml.safe_load(BOMB[: BOMB.index("f: ")])
    assert len(json.dumps(small)) > 9**5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "duplicate key"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested too deeply"),
        ('{"a":' * 50_000, "nested too deeply"),
        ('{"a":' * 100_000, "more than 262,144 bytes"),
        ("[1]", "is not a mapping of settings: it is a list"),
        ("{", "is not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        settings_file.read(file, "recipe")


def test_files_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    (tmp_path / "latin").write_bytes("family: cnn # ä".encode("latin-1"))
    for name, message in (
        ("pipe", "it is not a file"),
        (".", "it is not a file"),
        ("none", "No such file"),
        ("link", "symbolic links"),
        ("latin", "byte 14 is not UTF-8"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(UsageError, match=message):
            settings_file.read(tmp_path / name, "recipe")


def test_what_users_write_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ünï 😀.yaml"
    text = """\
base: &base {lr: 0.1, betas: [0.9, 0.999]}
one: {<<: *base, lr: 0.2}
range: 2:8
time: 1:30.5
date: 2024-01-01
names: [猫, "😀", "it's", 1_000, 0x10, true, ~]
"""
    file.write_text("\ufeff" + text, encoding="utf-8")
    assert settings_file.read(file, "recipe") == {
        "base": {"lr": 0.1, "betas": [0.9, 0.999]},
        "one": {"lr": 0.2, "betas": [0.9, 0.999]},
        "range": "2:8",
        "time": "1:30.5",
        "date": "2024-01-01",
        "names": ["猫", "😀", "it's", 1000, 16, True, None],
    }


def test_a_recipe_in_a_path_with_any_letters_is_read_from_its_json(tmp_path: Path) -> None:
    """JSON writes an emoji as two escapes, which YAML doesn't put together."""
    recipe = recipes.start("cnn").with_overrides({"data.path": "/data/猫 😀 it's"})
    file = tmp_path / "recipe.json"
    file.write_text(recipe.to_json(), encoding="utf-8")
    assert recipes.read(file) == recipe
    (tmp_path / "recipe.yaml").write_text(recipe.to_json(), encoding="utf-8")
    with pytest.raises(UsageError, match="escape"):  # the control
        recipes.read(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("section", ["model", "augment", "data", "optim", "train", "schedule"])
@pytest.mark.parametrize("value", ["~", "7", "2024-01-01", "[1]", "text", "true"])
def test_a_section_that_is_no_mapping_is_refused(tmp_path: Path, section: str, value: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"family: cnn\n{section}: {value}")
    with pytest.raises(UsageError, match=f"{section} = .*must be a mapping of settings"):
        recipes.read(file)


def test_a_long_value_is_cut_in_the_message(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"family: cnn\nseed: {'x' * 200_000}")
    with pytest.raises(UsageError) as caught:
        recipes.read(file)
    assert len(caught.value.message) < 300
