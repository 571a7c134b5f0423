"""Resolves and downloads the registered models that a training uses: its judge, and its start.

In: a recipe that names them. Out: the recipe with their versions and digests, and their files in
the run's folder.
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

USES = ("judge", "start_from")
"""Settings of a recipe that name a registered model; with `_digest`, that of its files."""


def pin(context: Context, recipe: Recipe) -> Recipe:
    """The recipe with the versions and digests that its references name now.

    Raises TesseraError if there is no such version.
    """
    from pipelines.workflows import model_reference, services

    for use in USES:
        reference = getattr(recipe, use)
        if not reference or getattr(recipe, f"{use}_digest"):
            continue
        version = model_reference.resolve(services.open_registry(context), reference)
        recipe = recipe.with_overrides(
            {
                use: f"models:/{version.name}/{version.number}",
                f"{use}_digest": services.registered_digest(version),
            }
        )
    return recipe


def fetch(recipe: Recipe, registry: Registry, run_folder: Path) -> None:
    """Downloads the files of all models that the recipe uses into the run's folder.

    Raises TesseraError if the training can't begin with the version that it names.
    """
    from pipelines.training import start
    from pipelines.training.run import JUDGE, START

    fetch_judge(recipe, registry, run_folder / JUDGE)
    if recipe.start_from:
        _fetch(recipe.start_from, recipe.start_from_digest, registry, run_folder / START)
        start.check_family(run_folder / START, recipe)


def fetch_judge(recipe: Recipe, registry: Registry, folder: Path) -> None:
    """Downloads the files of the recipe's judge, if it has one, into the new folder `folder`."""
    if recipe.judge:
        _fetch(recipe.judge, recipe.judge_digest, registry, folder)


def _fetch(reference: str, digest: str, registry: Registry, folder: Path) -> None:
    if folder.exists():
        return
    from pipelines.storage.atomic import replace_folder
    from pipelines.training import checkpoints
    from pipelines.workflows import model_reference

    with tempfile.TemporaryDirectory() as scratch:
        files = registry.download(model_reference.resolve(registry, reference), Path(scratch))
        checkpoints.check_digest(files, digest)
        with replace_folder(folder) as copy:
            shutil.copytree(files, copy, dirs_exist_ok=True)
