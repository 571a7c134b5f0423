"""Traces a registered version back to the run, the recipe, the data and the code behind it.

In: a version. Out: a `Lineage` with every fact that the registry and its run have. Must not print,
nor read the environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines import tag_names

if TYPE_CHECKING:
    from pipelines.interfaces import Version
    from pipelines.workflows.context import Context


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from. A text is empty if the fact isn't known.

    Args:
        version: `models:/NAME/NUMBER`.
        aliases: Of the version, such as `champion`.
        files: Checksum of the registered files.
        verdict: Whether it was promoted or refused, and why.
        evaluated: The images on which it was evaluated, and the digest of their data set.
        run, checkpoint, page: Name of its run, name of the checkpoint, link to the run.
        search, trial: The search that it is a trial of.
        family: Family and variant.
        data, data_digest: Name, location and digest of the data set.
        judge: The classifier that judged generated images, with the checksum of its files.
        start_from: The version that the training began with, with the checksum of its files.
        code, command, user: Git commit, program and user of the training.
        ray_job: Id of the Ray job.
        workers, hardware, python: What it was trained with.
        libraries: Name -> version.
        settings: Dotted path -> value of every setting of the recipe.
    """

    version: str
    aliases: tuple[str, ...]
    files: str
    verdict: str
    evaluated: str
    run: str
    checkpoint: str
    page: str
    search: str
    trial: str
    family: str
    data: str
    data_digest: str
    judge: str
    start_from: str
    code: str
    command: str
    user: str
    ray_job: str
    workers: str
    hardware: str
    python: str
    libraries: Mapping[str, str]
    settings: Mapping[str, Any]


def trace(model: str | Version, *, context: Context | None = None) -> Lineage:
    """The lineage of a model.

    Args:
        model: A reference (`NAME`, `NAME/2`, `NAME@champion`) or a version.
        context: Where MLflow is; from the environment by default.

    Raises TesseraError if Tessera didn't register the version, or if its run was deleted.
    """
    from pipelines import recipe as recipes
    from pipelines.promotion import gate
    from pipelines.workflows import model_reference, services
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    version = model_reference.resolve(services.open_registry(context), model)
    digest = services.registered_digest(version)
    tracker = services.attach_tracker(context, version.run_id)
    tags, _ = tracker.tags_and_params()
    verdict = json.loads(version.tags.get(tag_names.VERDICT, "null"))
    evaluation = gate.evaluation_of(version)
    tree = json.loads(version.tags[tag_names.RECIPE])
    recipe = dict(recipes.leaves(tree))
    verdict_text = ""
    if verdict:
        word = "promoted" if verdict["passed"] else "refused"
        verdict_text = f"{word}: {'; '.join(verdict['reasons'])}"
    return Lineage(
        version=f"models:/{version.name}/{version.number}",
        aliases=tuple(version.aliases),
        files=f"sha256 {digest}",
        verdict=verdict_text,
        evaluated=(
            f"{evaluation.samples:,} {evaluation.split} images of data {evaluation.data_digest}"
            if evaluation
            else ""
        ),
        run=version.tags.get(tag_names.RUN, ""),
        checkpoint=version.tags.get(tag_names.CHECKPOINT, ""),
        page=tracker.link(),
        search=version.tags.get(tag_names.SEARCH, ""),
        trial=version.tags.get(tag_names.TRIAL, ""),
        family=f"{tree['family']}, {tree['variant']}",
        data=f"{version.tags.get(tag_names.DATA_NAME, '')} in {tree['data']['path']}",
        data_digest=version.tags.get(tag_names.DATA_DIGEST, ""),
        judge=_used(tree, "judge"),
        start_from=_used(tree, "start_from"),
        code=tags.get("mlflow.source.git.commit", ""),
        command=tags.get("mlflow.source.name", ""),
        user=tags.get("mlflow.user", ""),
        ray_job=tags.get(tag_names.RAY_SUBMISSION) or tags.get(tag_names.RAY_JOB, ""),
        workers=str(tree["workers"]["count"]),
        hardware=tags.get(tag_names.HARDWARE, ""),
        python=tags.get(tag_names.PYTHON, ""),
        libraries={
            name.removeprefix(tag_names.LIBRARY_PREFIX): value
            for name, value in sorted(tags.items())
            if name.startswith(tag_names.LIBRARY_PREFIX)
        },
        settings=recipe,
    )


def _used(tree: Mapping[str, Any], use: str) -> str:
    return f"{tree[use]}, sha256 {tree[f'{use}_digest']}" if tree.get(use) else ""
