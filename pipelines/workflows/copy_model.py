"""Copies a champion into another registered model, for example from staging to production.

In: a version that is champion. Out: a new version of the other model, with the same files and the
same lineage tags. Whether it becomes champion there is decided by the gate.
"""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import tag_names

if TYPE_CHECKING:
    from pipelines.interfaces import Registry


def copy_version(
    registry: Registry,
    model: str,
    number: int,
    to_name: str,
    to_registry: str | None,
    *,
    dry_run: bool,
) -> tuple[Registry, str, int]:
    """Returns the registry, the name and the number of the copy. A version is copied once: a second
    call returns the same copy.

    Raises TesseraError if the version is not champion, or UsageError if there is no copy yet and
    `dry_run` forbids making one.
    """
    from models.core.errors import TesseraError, UsageError
    from pipelines.promotion import champions
    from pipelines.tracking.mlflow_registry import MlflowRegistry
    from pipelines.training import checkpoints
    from pipelines.workflows import services

    if to_name == model and not to_registry:
        raise UsageError("--to-name is the model itself", hint="name another model")
    version = registry.version(model, number)
    state = champions.read_state(registry, model)
    if not state.champion or state.champion.number != number:
        raise TesseraError(
            f"version {number} of {model!r} is not its champion",
            hint=f"promote it there first: tessera promote {shlex.quote(f'{model}/{number}')}",
        )
    target: Registry = MlflowRegistry(to_registry) if to_registry else registry
    digest = services.registered_digest(version)
    for known in target.versions(to_name):
        if known.tags.get(tag_names.DIGEST) == digest:
            return target, to_name, known.number
    if dry_run:
        raise UsageError(
            f"there is no copy of version {number} in {to_name!r} to evaluate",
            hint="run it without --dry-run: copying alone promotes nothing",
        )
    own = {tag_names.VERDICT, tag_names.DECISION}
    tags = {k: v for k, v in version.tags.items() if k.startswith("tessera.") and k not in own}
    tags[tag_names.COPIED_FROM] = f"models:/{model}/{number}"
    run_id = version.run_id
    if to_registry:
        run_id = _run_there(to_registry, f"copy-{model}-{number}", tags)
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry.download(version, Path(scratch))
        checkpoints.check_digest(folder, digest)
        copied = target.register(to_name, folder, run_id=run_id, tags=tags)
    return target, to_name, copied.number


def _run_there(uri: str, name: str, tags: dict[str, str]) -> str:
    """Creates a run in another MLflow for the copy, because the run of its training isn't there."""
    from pipelines.tracking import mlflow_runs

    lineage = {
        key: tags[key]
        for key in (tag_names.COPIED_FROM, tag_names.RUN, tag_names.DIGEST)
        if key in tags
    }
    tracker = mlflow_runs.open_run(
        uri, experiment="promotions", name=name, tags=lineage, artifact_root=None
    )
    tracker.finish("FINISHED")
    return tracker.run_id
