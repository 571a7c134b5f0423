"""What `evaluate` and `promote` share: one job that examines registered versions on the same images.

In: versions, a packed data set. Out: what was found of each, and beside each other. Imports the rooms
only when asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import tag_names

if TYPE_CHECKING:
    from pipelines.evaluation.results import Comparison, EvaluationResult
    from pipelines.interfaces import Version
    from pipelines.promotion.gate import Evaluation

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.evaluation.results import Comparison, EvaluationResult
    from pipelines.interfaces import Registry, Version
    from pipelines.promotion.gate import Evaluation
    from pipelines.workflows.context import Context

ROBUSTNESS = 500
"""Images that are spoiled for the report."""


@dataclass(frozen=True)
class Wanted:
    """What is found out beside the figures. `intervals`: how sure they are. `report` is the folder for
    page, data and pictures."""

    intervals: bool = True
    robustness: int = 0
    costs: bool = False
    fields: Mapping[str, Mapping[str, str]] | None = None
    confidence: float = 0.95
    report: Path | None = None


def examine(
    context: Context,
    registry: Registry,
    versions: Sequence[Version],
    data: str,
    wanted: Wanted,
    *,
    split: str = "test",
    workers: int = 0,
    verbose: bool = False,
) -> tuple[list[EvaluationResult], list[Comparison]]:
    """Examines the versions in one job, each image once; the first is compared with the others."""
    from pipelines import recipe as recipes
    from pipelines.cluster import workers as cluster_workers
    from pipelines.evaluation import job, results
    from pipelines.training import inputs
    from pipelines.workflows import judges, services

    context.home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=context.home) as scratch:
        told = []
        for place, version in enumerate(versions):
            own = Path(scratch) / str(place)
            model = {
                "name": f"models:/{version.name}/{version.number}",
                "model": str(registry.download(version, own)),
                "digest": services.registered_digest(version),
            }
            recipe = recipes.build(json.loads(version.tags[tag_names.RECIPE]))
            if recipe.judge:
                model["judge"] = str(own / inputs.JUDGE)
                judges.fetch(recipe, registry, own / inputs.JUDGE)
            told.append(model)
        payload: dict[str, Any] = {
            "models": told,
            "data": data,
            "split": split,
            "intervals": wanted.intervals,
            "robustness": wanted.robustness,
            "costs": wanted.costs,
            "fields": dict(wanted.fields or {}),
            "confidence": wanted.confidence,
            # Where the workers can write, whichever machine they are on.
            "report": str(Path(scratch) / "report") if wanted.report else None,
        }
        name = "-".join(["evaluate", versions[0].name, *(str(v.number) for v in versions)])
        storage = Path(scratch) / "ray"
        with services.executor(
            context,
            job.evaluate_models,
            cluster_workers.WorkerGroup(workers),
            name=name,
            storage=storage,
            verbose=verbose,
        ) as execute:
            result = execute(payload, _Silent())
        if wanted.report:
            shutil.copytree(payload["report"], wanted.report, dirs_exist_ok=True)
    return (
        [results.read_result(plain) for plain in result["models"]],
        [results.read_comparison(plain) for plain in result["comparisons"]],
    )


def note(
    context: Context,
    registry: Registry,
    version: Version,
    found: EvaluationResult,
    data: str,
    report: Path | None,
) -> Evaluation:
    """Writes the evaluation on the version, its figures and the report into the version's run."""
    from pipelines.interfaces import Point
    from pipelines.promotion.gate import Evaluation
    from pipelines.workflows import services

    evaluation = Evaluation(
        model_digest=found.digest,
        data_digest=found.data_digest,
        split=found.split,
        samples=found.samples,
        # Those of each class would be more than a tag takes.
        metrics={name: one.value for name, one in found.metrics.items() if "/" not in name},
        judge_digest=found.judge_digest,
        data=data,
    )
    tag = f"{tag_names.EVALUATION_PREFIX}{found.split}"
    tracker = services.attach_tracker(context, version.run_id)
    if version.tags.get(tag) != evaluation.to_json():
        registry.tag(version, {tag: evaluation.to_json()})
        tracker.dataset(name=found.data, digest=found.data_digest, source=data, split=found.split)
        values = {f"{found.split}/{name}": one.value for name, one in found.metrics.items()}
        tracker.metrics([Point(0, time.time_ns() // 1_000_000, values)])
    if report:
        store(tracker, report, f"evaluation/{found.split}")
    return evaluation


def store(tracker: Any, folder: Path, to: str) -> None:
    """The files of a folder as artifacts."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            below = path.parent.relative_to(folder).as_posix()
            tracker.artifact(path, to if below == "." else f"{to}/{below}")


class _Silent:
    """An `Emit` for work whose only result is what it returns."""

    def __call__(self, event: Mapping[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass


def evaluate(
    context: Context,
    model: str,
    data: str | Path,
    *,
    split: str = "test",
    workers: int = 0,
    verbose: bool = False,
) -> tuple[Version, Evaluation]:
    """The figures alone: evaluates, notes the evaluation on the version and in its run."""
    from pipelines.workflows.evaluate import Wanted

    found, _ = evaluate_all(
        context,
        [model],
        str(data),
        Wanted(intervals=False),
        split=split,
        workers=workers,
        verbose=verbose,
    )
    return found[0][0], found[0][2]


def evaluate_all(
    context: Context,
    names: Any,
    data: str,
    wanted: Any,
    *,
    split: str,
    workers: int,
    verbose: bool,
) -> tuple[list[tuple[Version, EvaluationResult, Evaluation]], list[Comparison]]:
    """Evaluates versions side by side, and notes what was found of each."""
    from models.core.errors import UsageError
    from pipelines.data import card as cards
    from pipelines.storage.base import absolute_location
    from pipelines.workflows import evaluate as workflows_evaluate
    from pipelines.workflows import model_reference, services

    data = absolute_location(data)
    cards.read(data).split(split)
    registry = services.open_registry(context)
    versions = [model_reference.resolve(registry, name) for name in names]
    if len({(version.name, version.number) for version in versions}) < len(versions):
        raise UsageError("a model is named twice", hint="name each once")
    found, compared = workflows_evaluate.examine(
        context, registry, versions, data, wanted, split=split, workers=workers, verbose=verbose
    )
    noted = [
        workflows_evaluate.note(context, registry, version, one, data, wanted.report)
        for version, one in zip(versions, found)
    ]
    return list(zip(versions, found, noted)), compared
