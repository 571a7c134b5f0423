"""What the verbs share to bring the rooms together: environment, services, a group of workers.

In: the environment. Out: a tracker, a registry, an executor for `pipelines.training.run`. Imports the rooms
only when asked.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from models.core.errors import TesseraError
from pipelines import tag_names
from pipelines.cluster import connection, workers
from pipelines.storage.base import cache_payload
from pipelines.tracking import mlflow_registry, mlflow_runs
from pipelines.workflows import paths

if TYPE_CHECKING:
    from pipelines.interfaces import Emit, Registry, Version
    from pipelines.recipe import Recipe
    from pipelines.tracking.mlflow_registry import MlflowRegistry
    from pipelines.tracking.mlflow_runs import MlflowTracker


def apply_settings() -> None:
    """Sets what Ray and MLflow must find in the environment; what the user set stays."""
    for name, value in {**mlflow_runs.settings(), **connection.settings(ray_address())}.items():
        os.environ.setdefault(name, value)


def ray_address() -> str | None:
    """RAY_ADDRESS, or None for an embedded cluster."""
    return os.environ.get("RAY_ADDRESS") or None


def open_registry() -> MlflowRegistry:
    apply_settings()
    uri = paths.tracking_uri()
    if uri == mlflow_runs.embedded_uri(paths.root()):
        mlflow_runs.prepare(paths.root())
    return mlflow_registry.MlflowRegistry(uri, ui=paths.ui_address())


def open_tracker(name: str, *, experiment: str, tags: dict[str, str]) -> MlflowTracker:
    apply_settings()
    uri = paths.tracking_uri()
    local = uri == mlflow_runs.embedded_uri(paths.root())
    if local:
        mlflow_runs.prepare(paths.root())
    return mlflow_runs.open_run(
        uri,
        experiment=experiment,
        name=name,
        tags=tags,
        artifact_root=mlflow_runs.embedded_artifacts(paths.root()) if local else None,
        ui=paths.ui_address(),
    )


def group_of(recipe: Recipe) -> workers.WorkerGroup:
    """The workers that a recipe asks for."""
    return workers.WorkerGroup(
        recipe.workers.count,
        cpus=recipe.workers.cpus,
        gpus=recipe.workers.gpus,
        max_failures=recipe.workers.max_failures,
    )


def tags_of(recipe: Recipe) -> dict[str, str]:
    """What a run says of what it trains, and of the Ray job that does."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    job = submitted.get("metadata", {}).get("job_submission_id")
    return {tag_names.FAMILY: recipe.family, **({tag_names.RAY_SUBMISSION: job} if job else {})}


@contextmanager
def joined(*, verbose: bool = False) -> Iterator[None]:
    """The user's cluster, or one that is started here and ended again."""
    apply_settings()
    # Ray prints what happens to its workers on stdout, where a script reads the result.
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stderr if verbose else nowhere):
        opened = connection.connect(ray_address(), verbose=verbose)
        try:
            yield
        finally:
            if opened:
                connection.disconnect()


@contextmanager
def executor(
    work: workers.Work,
    group: workers.WorkerGroup,
    *,
    name: str,
    storage: Path,
    verbose: bool = False,
) -> Iterator[Callable[[dict[str, Any], Emit], dict[str, Any]]]:
    """How to run `work`: in this process for 0 workers, else on the cluster, which is joined or
    started here and checked to have room for the group."""
    apply_settings()
    cache = {"cache": cache_payload()}
    if group.workers == 0:
        yield lambda payload, emit: workers.local(work, {**payload, **cache}, emit)
        return
    with joined(verbose=verbose):
        workers.check(group)
        yield lambda payload, emit: workers.train(
            work,
            {**payload, **cache},
            group,
            name=name,
            storage=storage,
            emit=emit,
            verbose=verbose,
        )


def attach_tracker(run_id: str) -> MlflowTracker:
    """The tracker of a run that exists; its status stays as it is."""
    apply_settings()
    return mlflow_runs.attach_run(paths.tracking_uri(), run_id, ui=paths.ui_address())


def resolve(registry: Registry, text: str) -> Version:
    """A version from `models:/NAME@alias`, `models:/NAME/3`, the same without `models:/`, or NAME,
    which is its newest version."""
    name = text.removeprefix("models:/")
    if "@" in name:
        name, _, alias = name.partition("@")
        return registry.version(name, alias)
    if "/" in name:
        name, _, number = name.partition("/")
        return registry.version(name, number)
    versions = registry.versions(name)
    if not versions:
        raise TesseraError(
            f"there is no registered model {name!r}", hint="train one: tessera train"
        )
    return versions[-1]


def registered_digest(version: Version) -> str:
    """The digest that the version's files must have."""
    digest = version.tags.get(tag_names.DIGEST)
    if not digest:
        raise TesseraError(
            f"version {version.number} of {version.name!r} was not registered by Tessera",
            hint="use a version that tessera train registered",
        )
    return digest


def page(link: str) -> str:
    """The link, and what is missing where nobody answers there."""
    place = urlsplit(link)
    try:
        with socket.create_connection((place.hostname or "", place.port or 443), timeout=1):
            return link
    except OSError:
        return f"{link} (once `tessera up` runs)"
