"""Shell completion: what it completes, and that errors never reach the shell."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import click
import click.shell_completion
import pytest

import models
from jobs.cli import tessera
from jobs.shared import completion
from pipelines.data import importers
from pipelines.tracking import mlflow_store
from pipelines.workflows import packaged_recipes


def complete(words: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The completions of a command line; its last word is incomplete."""
    *before, incomplete = words.split(" ")
    monkeypatch.setenv("COMP_WORDS", f"tessera {words}")
    shell = click.shell_completion.BashComplete(tessera, {}, "tessera", "_TESSERA_COMPLETE")
    return [item.value for item in shell.get_completions(before, incomplete)]


def test_names_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete("pro", monkeypatch) == ["promote"]
    assert complete("train dig", monkeypatch) == ["digits"]
    assert complete("train ", monkeypatch) == [*models.names(), *packaged_recipes.names()]
    assert complete("tune cnn --set optim.model.l", monkeypatch) == ["optim.model.lr="]
    assert complete("tune cnn --set optim.model.lr=", monkeypatch) == []
    assert complete("pack photos --format ", monkeypatch) == importers.names()
    assert complete("tune cnn --scheduler p", monkeypatch) == ["pbt"]


@pytest.mark.parametrize("family", models.names())
def test_variants_are_those_of_the_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete(f"train {family} --variant ", monkeypatch) == list(models.get(family).variants)


def test_models_of_the_embedded_store_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert complete("evaluate p", monkeypatch) == [], "there is no store yet"
    file = mlflow_store.embedded_uri(tmp_path).removeprefix("sqlite:///")
    with sqlite3.connect(file) as store:
        store.execute("CREATE TABLE registered_models (name TEXT)")
        store.execute("CREATE TABLE model_versions (name TEXT, version INTEGER)")
        store.execute("CREATE TABLE registered_model_aliases (name TEXT, alias TEXT)")
        store.execute("INSERT INTO registered_models VALUES ('photos'), ('digits')")
        store.execute("INSERT INTO model_versions VALUES ('photos', 1), ('photos', 2)")
        store.execute("INSERT INTO registered_model_aliases VALUES ('photos', 'champion')")
    store.close()
    assert complete("evaluate p", monkeypatch) == ["photos"]
    assert complete("promote photos/", monkeypatch) == ["photos/1", "photos/2"]
    assert complete("predict models:/photos@c", monkeypatch) == ["models:/photos@champion"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert complete("evaluate p", monkeypatch) == []


def test_a_failing_completion_returns_nothing() -> None:
    def broken(ctx: click.Context, incomplete: str) -> list[str]:
        raise OSError

    context = click.Context(tessera)
    assert completion._completer(broken)(context, click.Argument(["x"]), "") == []
