"""Connects a workflow with its services: MLflow, the model registry, Ray, a group of workers.

In: a `Context`. Out: a tracker, a registry, an executor for `pipelines.training.driver`. Ray and
MLflow are loaded when a function needs them.
"""

from __future__ import annotations

import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from models.core.errors import TesseraError
from pipelines import tag_names
from pipelines.cluster import connection, session, shared_folder, worker_count, workers
from pipelines.storage.base import CacheSettings, use_cache
from pipelines.tracking import mlflow_registry, mlflow_runs, mlflow_store

if TYPE_CHECKING:
    from pipelines.interfaces import Emit, Version
    from pipelines.recipe import Recipe
    from pipelines.tracking.mlflow_registry import MlflowRegistry
    from pipelines.tracking.mlflow_runs import MlflowTracker
    from pipelines.workflows.context import Context

Payload = TypeVar("Payload")
Result = TypeVar("Result")


def apply_settings(context: Context) -> None:
    """Prepares this process for `context`: the environment variables that Ray and MLflow read when
    they are imported (a variable that the user set stays), and the cache of remote shards."""
    name = session.user_name()  # without one, libraries fail
    settings = {
        **mlflow_runs.settings(),
        **connection.settings(context.ray_address),
        **({"USER": name, "LOGNAME": name} if name == f"uid{os.getuid()}" else {}),
    }
    try:
        Path.home()
    except RuntimeError:  # neither HOME nor an entry in the list of users, as in a container
        settings["HOME"] = str(CacheSettings.default().folder.parents[2])
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    use_cache(context.cache)


def open_registry(context: Context, *, create: bool = False) -> MlflowRegistry:
    """The model registry. Without `create` an embedded store must exist: a command that only reads
    leaves nothing behind.

    Raises TesseraError if no model can be registered yet.
    """
    apply_settings(context)
    if context.is_embedded:
        if not create and not has_registry(context):
            raise TesseraError("no model is registered yet", hint="train one: tessera train")
        mlflow_store.prepare(context.home)
    return mlflow_registry.MlflowRegistry(context.tracking_uri, public_url=context.public_url)


def has_registry(context: Context) -> bool:
    """Whether there is a registry: a server, or an embedded store that exists."""
    return not context.is_embedded or mlflow_store.exists(context.home)


def open_tracker(
    context: Context, name: str, *, experiment: str, tags: dict[str, str], run_id: str = ""
) -> MlflowTracker:
    """A run in MLflow: the existing run of this name, or a new one. `run_id` is that of a training
    that is resumed."""
    apply_settings(context)
    if context.is_embedded:
        mlflow_store.prepare(context.home)
    return mlflow_runs.open_run(
        context.tracking_uri,
        experiment=experiment,
        name=name,
        tags=tags,
        artifact_root=mlflow_store.embedded_artifacts(context.home)
        if context.is_embedded
        else None,
        public_url=context.public_url,
        run_id=run_id,
    )


def tags_of(recipe: Recipe) -> dict[str, str]:
    """Tags with the family that a run trains and the Ray job that it runs in."""
    job = connection.submission_id()
    return {tag_names.FAMILY: recipe.family, **({tag_names.RAY_SUBMISSION: job} if job else {})}


@contextmanager
def joined(context: Context, *, cpus: int | None = None, verbose: bool = False) -> Iterator[None]:
    """Connects to the user's cluster, or starts one with `cpus` and ends it afterwards. A process
    that is already connected, such as a Ray task, stays connected to its cluster."""
    apply_settings(context)
    # Ray prints messages about its workers to stdout, where a script reads the result.
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stderr if verbose else nowhere):
        opened = connection.connect(context.ray_address, cpus=cpus, verbose=verbose)
        try:
            yield
        finally:
            if opened:
                connection.disconnect()


def known_resources(context: Context) -> connection.Resources | None:
    """What workers can use, if that is known without joining a cluster; otherwise None."""
    apply_settings(context)
    return connection.known_resources(context.ray_address)


@contextmanager
def executor(
    context: Context,
    work: workers.Work[Payload, Result],
    group: worker_count.WorkerGroup,
    *,
    name: str,
    storage: Path,
    verbose: bool = False,
    say: Callable[[str], None] | None = None,
    check_shared: bool = True,
) -> Iterator[Callable[[Payload, Emit], Result]]:
    """A function that runs `work`: in this process for 0 workers, otherwise on the cluster, which
    is joined or started here. With `say`, which gets lines for the user, it waits until the group
    fits on a cluster that was joined.

    `storage` is a folder for Ray's own files. Unless files are kept in an object store, the folder
    that it is in must be shared by all machines, which `check_shared` asks.

    Raises TesseraError if the group doesn't fit, or if a machine doesn't share the folder.
    """
    apply_settings(context)
    if group.workers == 0:
        yield lambda payload, emit: workers.run_local(work, payload, emit)
        return
    with joined(context, verbose=verbose):
        if group.wait_seconds is None:
            waits = context.ray_address and say
            group = replace(group, wait_seconds=worker_count.WAIT_SECONDS if waits else 0.0)
        gpus = worker_count.wait_until_fits(group, say or (lambda text: None))
        group = replace(group, gpus=gpus)
        if check_shared and not context.remote_storage:
            shared_folder.check_shared(storage.parent, cpus=group.cpus)
        yield lambda payload, emit: workers.run_group(
            work,
            payload,
            group,
            name=name,
            storage=storage,
            emit=emit,
            verbose=verbose,
        )


@contextmanager
def temporary_storage(context: Context, kind: str) -> Iterator[str]:
    """An address in the storage of runs for files that a job's workers exchange with this process;
    they are removed at the end. Empty if runs are kept in a folder."""
    if not context.remote_storage:
        yield ""
        return
    from pipelines.training.run_storage import RunStorage, address_of

    address = address_of(context.remote_storage, "temporary", f"{kind}-{uuid.uuid4().hex[:8]}")
    try:
        yield address
    finally:
        RunStorage.open(address).remove_all()


def attach_tracker(context: Context, run_id: str) -> MlflowTracker:
    """The tracker of an existing run. The run's status doesn't change."""
    apply_settings(context)
    return mlflow_runs.attach_run(context.tracking_uri, run_id, public_url=context.public_url)


def registered_digest(version: Version) -> str:
    """The digest that the version's files must have."""
    digest = version.tags.get(tag_names.DIGEST)
    if not digest:
        raise TesseraError(
            f"version {version.number} of {version.name!r} was not registered by Tessera",
            hint="use a version that tessera train registered",
        )
    return digest


def page(context: Context, link: str) -> str:
    """The link, with a note if the server can't be reached from here. A public address is meant for
    another machine's browser: whether this one reaches it says nothing."""
    if context.public_url:
        return link
    parts = urlsplit(link)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((host, port), timeout=1):
            return link
    except OSError:
        local = host in ("localhost", "127.0.0.1", "::1")
        return f"{link} ({'once `tessera up` runs' if local else 'not reachable now'})"
