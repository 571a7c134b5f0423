"""What the shell completes: families, variants, recipes, formats, setting paths, models.

In: the text before the cursor. Out: names that begin with it. Completion must be fast and must
never fail: models are read from the embedded MLflow's SQLite file without importing MLflow, and if
something can't be read, no names are offered.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import pkgutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import click

Completer = Callable[[click.Context, click.Parameter, str], list[str]]


def _completer(names: Callable[[click.Context, str], Iterable[str]]) -> Completer:
    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        with contextlib.suppress(Exception):  # an error would be printed into the prompt
            return [name for name in names(ctx, incomplete) if name.startswith(incomplete)]
        return []

    return complete


def _families(ctx: click.Context, incomplete: str) -> list[str]:
    import models

    return models.names()


def _families_and_recipes(ctx: click.Context, incomplete: str) -> list[str]:
    from pipelines.workflows import packaged_recipes

    return [*_families(ctx, incomplete), *packaged_recipes.names()]


def _family_or_recipe(ctx: click.Context) -> str:
    """The family or recipe that `train`, `tune` or `describe` is called with. After an option
    without a value click passes no arguments, so the words of the line are searched too."""
    named: str = ctx.params.get("what") or ctx.params.get("family") or ""
    known = _families_and_recipes(ctx, "")
    words = os.environ.get("COMP_WORDS", "").split()[2:]
    return named or next((word for word in words if word in known), "")


def _variants(ctx: click.Context, incomplete: str) -> list[str]:
    """Read from the family's source: importing it would import torch, which takes a second."""
    import models

    family = _family_or_recipe(ctx)
    if family not in models.names():
        return []
    for node in ast.walk(ast.parse((Path(models.__path__[0]) / f"{family}.py").read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else []
        named = any(isinstance(target, ast.Name) and target.id == "variants" for target in targets)
        if named and isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            keys = [k.value for k in node.value.keys if isinstance(k, ast.Constant)]
            if len(keys) == len(node.value.keys):
                return list(map(str, keys))
    return list(models.get(family).variants)


def _formats(ctx: click.Context, incomplete: str) -> list[str]:
    # Listed without importing the importers, which import NumPy and more.
    spec = importlib.util.find_spec("pipelines.data.importers")
    folders = spec.submodule_search_locations if spec else None
    return sorted(m.name for m in pkgutil.iter_modules(folders) if not m.ispkg)


def _settings(ctx: click.Context, incomplete: str) -> list[str]:
    """Paths of the recipe, each with a `=`. Values are not completed."""
    from pipelines import recipe as recipes
    from pipelines.workflows import packaged_recipes

    what = _family_or_recipe(ctx)
    if not what or "=" in incomplete:
        return []
    tree = packaged_recipes.start(what, ctx.params.get("variant")).model_dump(mode="json")
    return [f"{path}=" for path, _ in recipes.leaves(tree) if path not in ("family", "variant")]


def _models(ctx: click.Context, incomplete: str) -> list[str]:
    """NAME; after a full name also NAME/2 and NAME@alias."""
    from pipelines.tracking import mlflow_store
    from pipelines.workflows.context import Context

    context = Context.from_environment()
    prefix = "sqlite:///"
    if context.tracking_uri != mlflow_store.embedded_uri(context.home):
        return []  # a server: asking it takes too long for a completion
    file = context.tracking_uri.removeprefix(prefix).partition("?")[0]
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
        names = [name for (name,) in store.execute("SELECT name FROM registered_models")]
        versions = store.execute("SELECT name, version FROM model_versions").fetchall()
        aliases = store.execute("SELECT name, alias FROM registered_model_aliases").fetchall()
    typed = incomplete.removeprefix("models:/")
    listed = [
        *names,
        *(f"{name}@{alias}" for name, alias in aliases if typed.startswith(name)),
        *(f"{name}/{number}" for name, number in versions if typed.startswith(name)),
    ]
    return [incomplete[: len(incomplete) - len(typed)] + name for name in sorted(listed)]


families = _completer(_families)
families_and_recipes = _completer(_families_and_recipes)
variants = _completer(_variants)
formats = _completer(_formats)
settings = _completer(_settings)
registered_models = _completer(_models)
