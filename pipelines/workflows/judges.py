"""Resolves and downloads judges: registered classifiers that evaluate the images of a generator.

In: a recipe that names a judge. Out: the recipe with the judge's version and digest, and the
judge's files in a folder.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.interfaces import Registry
    from pipelines.recipe import Recipe
    from pipelines.workflows.context import Context


def pin(context: Context, recipe: Recipe) -> Recipe:
    """The recipe with the version and digest that its judge's reference names now."""
    if not recipe.judge or recipe.judge_digest:
        return recipe
    from pipelines.workflows import model_reference, services

    version = model_reference.resolve(services.open_registry(context), recipe.judge)
    return recipe.with_overrides(
        {
            "judge": f"models:/{version.name}/{version.number}",
            "judge_digest": services.registered_digest(version),
        }
    )


def fetch(recipe: Recipe, registry: Registry, folder: Path) -> None:
    """Downloads the files of the recipe's judge, if it has one, into the new folder `folder`."""
    if not recipe.judge or folder.exists():
        return
    from pipelines.storage.atomic import replace_folder
    from pipelines.training import checkpoints
    from pipelines.workflows import model_reference

    with tempfile.TemporaryDirectory() as scratch:
        files = registry.download(model_reference.resolve(registry, recipe.judge), Path(scratch))
        checkpoints.check_digest(files, recipe.judge_digest)
        with replace_folder(folder) as copy:
            shutil.copytree(files, copy, dirs_exist_ok=True)
