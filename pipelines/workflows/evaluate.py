"""Evaluates registered versions on one split of a packed data set, each image once.

In: versions and a packed data set. Out: an `EvaluationReport`; its metrics are also stored with the
versions and in their runs. Must not print, nor read the environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import tag_names

if TYPE_CHECKING:
    from pipelines.evaluation.results import Comparison, EvaluationResult
    from pipelines.interfaces import Registry, Version
    from pipelines.promotion.gate import Evaluation
    from pipelines.workflows.context import Context

ROBUSTNESS = 500
"""Default number of images that are corrupted for the report."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured in addition to the metrics.

    Args:
        intervals: Whether to compute bootstrap confidence intervals and slices.
        robustness: Number of images to corrupt and attack; 0 for none.
        costs: Whether to measure time and memory.
        fields: Additional slices: field -> sample key -> value.
        confidence: Confidence level of the differences between models.
        report: Folder for the page, its data and its images; None for no report.
    """

    intervals: bool = True
    robustness: int = 0
    costs: bool = False
    fields: Mapping[str, Mapping[str, str]] | None = None
    confidence: float = 0.95
    report: Path | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """The result of `evaluate`.

    `models` are in the order of the arguments. `comparisons` compare the first model with each of
    the others. `folder` holds `report.html`, or is None without a report.
    """

    models: tuple[EvaluationResult, ...]
    comparisons: tuple[Comparison, ...]
    versions: tuple[Version, ...]
    data: str
    split: str
    folder: Path | None

    @property
    def metrics(self) -> dict[str, float]:
        """The first model's metrics, by name; those of a class have its name after a slash."""
        return {name: estimate.value for name, estimate in self.models[0].metrics.items()}

    @property
    def samples(self) -> int:
        """How many images were evaluated."""
        return self.models[0].samples

    @property
    def page(self) -> Path | None:
        """The report as an HTML page."""
        return self.folder / "report.html" if self.folder else None


def evaluate(
    models: str | Version | Sequence[str | Version],
    *,
    data: str | os.PathLike[str],
    split: str = "test",
    workers: int = 0,
    report: bool | str | os.PathLike[str] = True,
    robustness: int = ROBUSTNESS,
    fields: str | os.PathLike[str] | Mapping[str, Mapping[str, str]] | None = None,
    intervals: bool = True,
    verbose: bool = False,
    context: Context | None = None,
) -> EvaluationReport:
    """Evaluates one or several registered models on the same images.

    Args:
        models: References (`NAME`, `NAME/2`, `NAME@alias`) or versions; the first is compared with
            each of the others.
        data: A packed data set: a folder, an address, or what `pack` returned.
        split: `train`, `val` or `test`.
        workers: Data-parallel workers; 0 evaluates in this process. The metrics don't depend on it.
        report: A new folder for the report, True for one in the home folder, False for the metrics
            only. The report is also stored in MLflow.
        robustness: Number of images to corrupt and attack for the report; 0 for none.
        fields: A CSV file with a column `key`, or field -> key -> value: slices by these fields.
        intervals: Whether to compute 95 % bootstrap confidence intervals; False is faster.
        verbose: Whether to show Ray's own output.
        context: Where MLflow and Ray are; from the environment by default.

    Raises TesseraError if a model, the data set or the split doesn't exist, or if the models can't
    be evaluated on it.
    """
    from models.core.errors import UsageError
    from pipelines.data import card as cards
    from pipelines.evaluation import slices
    from pipelines.storage.base import absolute_location
    from pipelines.workflows import model_reference, services
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    named = [models] if isinstance(models, str) or not isinstance(models, Sequence) else models
    references = [model_reference.of(model) for model in named]
    folder = _report_folder(context, report, "-".join(map(str, references)), split)
    if isinstance(fields, str | os.PathLike):
        fields = slices.read_fields(Path(fields))
    options = EvaluationOptions(intervals=intervals)
    if folder:
        options = EvaluationOptions(
            intervals=intervals, robustness=robustness, costs=True, fields=fields, report=folder
        )
    data = absolute_location(os.fspath(data))
    cards.read(data).split(split)
    registry = services.open_registry(context)
    versions = [reference.resolve(registry) for reference in references]
    if len({(version.name, version.number) for version in versions}) < len(versions):
        raise UsageError("a model is named twice", hint="name each once")
    results, comparisons = measure(
        context, registry, versions, data, options, split=split, workers=workers, verbose=verbose
    )
    for version, result in zip(versions, results):
        note(context, registry, version, result, data, folder)
    return EvaluationReport(
        tuple(results), tuple(comparisons), tuple(versions), data, split, folder
    )


def _report_folder(
    context: Context, report: bool | str | os.PathLike[str], models: str, split: str
) -> Path | None:
    """The folder of the report, which must not exist or be empty; None for no report."""
    from models.core.errors import UsageError

    if report is False:
        return None
    if report is True:
        name = re.sub(r"[^\w.-]+", "-", models)[:80].strip("-.")
        return context.reports_dir / f"{name}-{split}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(report).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} already exists", hint="name a new folder")
    return folder


def measure(
    context: Context,
    registry: Registry,
    versions: Sequence[Version],
    data: str,
    options: EvaluationOptions,
    *,
    split: str = "test",
    workers: int = 0,
    verbose: bool = False,
) -> tuple[list[EvaluationResult], list[Comparison]]:
    """Evaluates the versions in one job and compares the first with each of the others. Writes
    nothing to the registry."""
    from pipelines import recipe as recipes
    from pipelines.cluster.worker_count import WorkerGroup
    from pipelines.evaluation import exchange, job
    from pipelines.evaluation.payload import EvaluationPayload, ModelFiles
    from pipelines.interfaces import NullEmit
    from pipelines.storage.base import cache_payload
    from pipelines.training.run import JUDGE
    from pipelines.workflows import services, used_models

    context.home.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=context.home) as scratch,
        services.temporary_storage(context, "evaluate") if workers else nullcontext("") as address,
    ):
        files = []
        for number, version in enumerate(versions):
            folder = Path(scratch) / str(number)
            downloaded = registry.download(version, folder)
            recipe = recipes.build(json.loads(version.tags[tag_names.RECIPE]))
            if recipe.judge:
                used_models.fetch_judge(recipe, registry, folder / JUDGE)
            files.append(
                ModelFiles(
                    name=f"models:/{version.name}/{version.number}",
                    folder=downloaded,
                    digest=services.registered_digest(version),
                    judge=folder / JUDGE if recipe.judge else None,
                )
            )
        # Below the home folder, because workers on all machines can write there.
        report = Path(scratch) / "report" if options.report else None
        payload = EvaluationPayload(
            models=tuple(files),
            data=data,
            split=split,
            intervals=options.intervals,
            robustness=options.robustness,
            costs=options.costs,
            fields=dict(options.fields or {}),
            confidence=options.confidence,
            report=report,
            cache=cache_payload(),
            storage=address,
        )
        name = "-".join(["evaluate", versions[0].name, *(str(v.number) for v in versions)])
        storage = Path(scratch) / "ray"
        with services.executor(
            context,
            job.evaluate_models,
            WorkerGroup(workers),
            name=name,
            storage=storage,
            verbose=verbose,
        ) as execute:
            if address:
                exchange.publish_models(payload)
            results = execute(payload, NullEmit())
            if address:
                exchange.fetch_report(payload)
        if report and options.report:
            shutil.copytree(report, options.report, dirs_exist_ok=True)
    return list(results.models), list(results.comparisons)


def note(
    context: Context,
    registry: Registry,
    version: Version,
    result: EvaluationResult,
    data: str,
    report: Path | None,
) -> Evaluation:
    """Stores the metrics as a tag of the version, and metrics and report in the version's run."""
    from pipelines.interfaces import Point
    from pipelines.promotion.gate import Evaluation
    from pipelines.workflows import services

    evaluation = Evaluation(
        model_digest=result.digest,
        data_digest=result.data_digest,
        split=result.split,
        samples=result.samples,
        # The metrics of each class would be too long for a tag.
        metrics={name: one.value for name, one in result.metrics.items() if "/" not in name},
        judge_digest=result.judge_digest,
        data=data,
    )
    tag = f"{tag_names.EVALUATION_PREFIX}{result.split}"
    tracker = services.attach_tracker(context, version.run_id)
    if version.tags.get(tag) != evaluation.to_json():
        registry.tag(version, {tag: evaluation.to_json()})
        tracker.dataset(
            name=result.data, digest=result.data_digest, source=data, split=result.split
        )
        values = {f"{result.split}/{name}": one.value for name, one in result.metrics.items()}
        tracker.metrics([Point(0, time.time_ns() // 1_000_000, values)])
    if report:
        store(tracker, report, f"evaluation/{result.split}")
    return evaluation


def store(tracker: Any, folder: Path, to: str) -> None:
    """Stores the files of a folder as artifacts."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            below = path.parent.relative_to(folder).as_posix()
            tracker.artifact(path, to if below == "." else f"{to}/{below}")
