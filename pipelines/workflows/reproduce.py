"""Trains a registered version again from its own recipe and data, and compares the two.

In: a version. Out: a `Reproduction`; nothing is registered. Must not print, nor read the
environment.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import tag_names

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.interfaces import Listener, Version
    from pipelines.workflows.context import Context

TOLERANCE = 0.02
"""Default relative tolerance of the metrics, if hardware or libraries differ."""


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a second training with the first.

    Args:
        model: The version, as `models:/NAME/NUMBER`.
        reproduced: Whether the weights are the same bit for bit or, if hardware or libraries
            differ, the metrics are within `tolerance`.
        weights: The largest difference of the weights, as text.
        differences: The differences in hardware and libraries.
        metrics: Name -> (first training, second training), on the validation split.
        tolerance: Relative tolerance of the metrics.
    """

    model: str
    reproduced: bool
    weights: str
    differences: tuple[str, ...]
    metrics: Mapping[str, tuple[float, float]]
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `tessera reproduce --json` prints."""
        return asdict(self)


def reproduce(
    model: str | Version,
    *,
    data: str | os.PathLike[str] | None = None,
    tolerance: float = TOLERANCE,
    verbose: bool = False,
    progress: bool | Listener = True,
    context: Context | None = None,
) -> Reproduction:
    """Trains a registered version again.

    Args:
        model: A reference (`NAME`, `NAME/2`, `NAME@champion`) or a version.
        data: Location of its data set, if it was moved.
        tolerance: Relative tolerance of the metrics, if hardware or libraries differ.
        verbose: Whether to show Ray's own output.
        progress: True for a display on stderr, False for none, or a `Listener`.
        context: Where MLflow and Ray are; from the environment by default.

    Raises TesseraError if its files or its data are not those that it was registered with.
    """
    from pipelines import recipe as recipes
    from pipelines.storage.base import absolute_location
    from pipelines.tracking.memory import MemoryTracker
    from pipelines.training import checkpoints, worker
    from pipelines.training import driver as training_driver
    from pipelines.training import run as training_run
    from pipelines.training.payload import TrainingSummary
    from pipelines.training.setup import worker_group
    from pipelines.visuals.progress import show_progress
    from pipelines.workflows import model_reference, services, train, used_models
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    registry = services.open_registry(context)
    version = model_reference.resolve(registry, model)
    digest = services.registered_digest(version)
    recipe = recipes.build(json.loads(version.tags[tag_names.RECIPE]))
    if data:
        recipe = recipe.with_overrides({"data.path": absolute_location(os.fspath(data))})
    setup = train.prepare(context, recipe)
    recipe = setup.recipe
    again: dict[str, Tensor] = {}

    def keep(best: Path, summary: TrainingSummary) -> None:
        again.update(checkpoints.load(best).weights)

    context.home.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=context.home, prefix=".reproduce-") as scratch,
        services.temporary_storage(context, "reproduce") as address,
    ):
        registered = checkpoints.read_model(registry.download(version, Path(scratch)), digest)
        run = training_run.find_or_create(
            Path(scratch), recipe, name="again", model=version.name, storage=address
        )
        used_models.fetch(recipe, registry, run.folder)
        tracker = MemoryTracker()
        primary = recipe.primary().name
        group = worker_group(recipe)
        with (
            show_progress(progress) as listener,
            services.executor(
                context,
                worker.run,
                group,
                name=run.name,
                storage=run.folder / "ray",
                verbose=verbose,
                say=lambda text: listener({"kind": "notice", "text": text}),
            ) as execute,
        ):
            listener(
                {
                    "kind": "run",
                    "name": f"{version.name}/{version.number} again",
                    "metric": primary,
                    "page": "",
                }
            )
            trained = training_driver.train(
                run,
                setup,
                tracker=tracker,
                execute=execute,
                is_permanent=lambda error: True,
                listeners=[listener],
                conclude=keep,
            )
    before, _ = services.attach_tracker(context, version.run_id).tags_and_params()
    was = json.loads(version.tags.get(tag_names.METRICS, "{}"))
    metrics = {
        n: (float(was[f"val/{n}"]), v) for n, v in trained.metrics.items() if f"val/{n}" in was
    }
    apart = largest_difference(registered.weights, again)
    differences = changed(before, tracker.logged_tags)
    close = all(math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-9) for a, b in metrics.values())
    return Reproduction(
        model=f"models:/{version.name}/{version.number}",
        reproduced=apart == 0.0 or (bool(differences) and bool(metrics) and close),
        weights="the same, bit for bit" if apart == 0.0 else f"up to {apart:.3g} apart",
        differences=tuple(differences),
        metrics=metrics,
        tolerance=tolerance,
    )


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """0.0 only if every tensor has the same bits; infinite if names, shapes or dtypes differ."""
    import torch

    if one.keys() != other.keys():
        return math.inf
    apart = 0.0
    for name, tensor in one.items():
        again = other[name]
        if (tensor.shape, tensor.dtype) != (again.shape, again.dtype):
            return math.inf
        bits, bits_again = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, again))
        if not torch.equal(bits, bits_again):
            difference = float((tensor.double() - again.double()).abs().max())
            # 0.0 and -0.0 are equal, but their bits differ.
            apart = (
                max(apart, difference or math.ulp(0.0)) if difference == difference else math.inf
            )
    return apart


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The differences in hardware and libraries from the version's own run."""
    names = [tag_names.HARDWARE, tag_names.PYTHON]
    names += sorted(n for n in {*before, *now} if n.startswith(tag_names.LIBRARY_PREFIX))
    return [
        f"{n.removeprefix('tessera.').removeprefix('version.')} was {before.get(n, 'unknown')}, "
        f"is {now.get(n, 'unknown')}"
        for n in names
        if before.get(n) != now.get(n)
    ]
