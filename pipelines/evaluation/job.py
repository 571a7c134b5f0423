"""Evaluates one or several models on the same images of a split.

In: an `EvaluationPayload`. Out: `EvaluationResults`, and the report's files. It is one job: every
rank predicts its part of the images, rank 0 computes metrics, intervals and costs. Must not know
what the results are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.core.errors import TesseraError, UsageError
from models.core.family import Batch
from models.metrics import custom as custom_metrics
from pipelines.evaluation import bootstrap, costs, exchange, gradients, robustness, slices
from pipelines.evaluation.evaluated import EvaluatedModel
from pipelines.evaluation.payload import EvaluationPayload, EvaluationResults, ModelFiles
from pipelines.evaluation.results import Comparison, EvaluationResult, SliceMetrics
from pipelines.interfaces import Emit, World
from pipelines.recipe import Recipe
from pipelines.storage.base import use_cache_of
from pipelines.training import distributed, evaluator, hardware, loaded_model
from pipelines.training.evaluator import Predictions
from pipelines.training.loaded_model import LoadedModel

LARGEST_BATCH = 256
SLICE_RESAMPLES = 200


def evaluate_models(payload: EvaluationPayload, world: World, emit: Emit) -> EvaluationResults:
    """Called by all ranks. Raises UsageError if the models can't be compared with each other."""
    use_cache_of(payload.cache)
    if payload.storage:
        payload = exchange.fetch_models(payload)
    evaluated: list[EvaluatedModel] = []
    for files in payload.models:
        first = evaluated[0].model.model.recipe if evaluated else None
        one = _evaluate(files, payload, world, first)
        if one is not None:
            if evaluated:
                _check_comparable(evaluated[0].result, one.result)
            evaluated.append(one)
    if payload.storage:
        distributed.broadcast(None, world)  # collective: all ranks have read the files
        exchange.remove_copies(payload)
    if not world.leads:
        return EvaluationResults()
    comparisons = [_compare(evaluated[0], other, payload.confidence) for other in evaluated[1:]]
    if payload.report:
        from pipelines.evaluation import report

        report.write(payload.report, evaluated, comparisons, payload.split)
        if payload.storage:
            exchange.publish_report(payload)
    return EvaluationResults(tuple(one.result for one in evaluated), tuple(comparisons))


def _evaluate(
    files: ModelFiles, payload: EvaluationPayload, world: World, first: Recipe | None
) -> EvaluatedModel | None:
    """`first` is the recipe of the model that this one is compared with: both get its metrics, and
    its primary one. Rank 0 alone has it, and needs it."""
    split = payload.split
    model = loaded_model.load_model(
        files.folder, files.digest, payload.data, world, judge=files.judge
    )
    task, data = model.family.task, model.data
    predictions = evaluator.predict_split(
        model.family,
        model.evaluator,
        data,
        model.loader(split, world),
        world,
        describe=slices.describe if task.takes_images else None,
    )
    names = custom_metrics.merge(first.metrics if first else (), model.model.recipe.metrics)
    primary = (first or model.model.recipe).primary()
    robust = robustness.measure(
        model, split, payload.robustness, world, metrics=names, primary=primary.name
    )
    measured = _costs(model, files.folder, split) if payload.costs and world.leads else {}
    # The other ranks wait here: they would take time from what is being measured.
    distributed.broadcast(None, world)
    if predictions is None:
        return None
    select = custom_metrics.bootstrap_metrics(task, names, predictions.records, data)
    count = len(predictions.records)
    metrics = select(range(count))
    bootstrap_samples = task.bootstrap_samples if payload.intervals else 0
    resampled = bootstrap.resampled_metrics(
        select, count, bootstrap_samples, with_replacement=task.resample_with_replacement
    )
    result = EvaluationResult(
        model=files.name,
        digest=model.model.digest,
        family=model.family.name,
        task=task.name,
        primary=primary.name,
        direction=primary.direction,
        data=model.card.name,
        data_digest=model.card.digest,
        split=split,
        samples=count,
        metrics=bootstrap.estimates(metrics, resampled),
        slices=_slices(model, predictions, payload.fields) if bootstrap_samples else (),
        robustness=robust,
        costs=measured,
        hardware=hardware.describe(),
        judge_digest=model.model.recipe.judge_digest,
        class_direction=task.primary.direction,
    )
    return EvaluatedModel(model, predictions, metrics, resampled, result)


def _costs(model: LoadedModel, folder: Path, split: str) -> dict[str, float]:
    """Measures the network, including what follows its last layer, on transformed images. Reading,
    decoding and transforming them isn't included."""
    few = np.arange(min(model.card.split(split).samples, model.family.task.eval_batch))
    (_, batch), *_ = model.loader(split, World(), only=few).batches()
    transformed, rows = model.evaluator.transform(batch), len(few)

    def make_batch(size: int) -> Batch:
        chosen = [row % rows for row in range(size)]
        return {
            name: value[chosen] if isinstance(value, Tensor) else [value[row] for row in chosen]
            for name, value in transformed.items()
        }

    def predict(batch: Batch) -> object:
        with torch.no_grad():
            return model.family.predict(model.module, batch)

    device = str(next(model.module.parameters()).device)
    one = make_batch(1)
    with gradients.eval_mode(model.module):
        time = costs.latency(predict, one, device, seconds=0.5)
        best = costs.throughput(predict, make_batch, device, largest=LARGEST_BATCH, seconds=0.2)
        memory = costs.peak_memory(predict, one, device)
        measured: dict[str, float] = {
            "parameters": costs.parameters(model.module),
            "flops": costs.flops(predict, one),
            "size_bytes": costs.size_bytes(folder),
            "latency_p50_ms": time.p50_milliseconds,
            "latency_p95_ms": time.p95_milliseconds,
            "images_per_second": best.images_per_second,
            "best_batch": best.batch_size,
        }
    if memory:
        measured["peak_memory_bytes"] = memory.peak_bytes
    return measured


def _slices(
    model: LoadedModel, predictions: Predictions, fields: Mapping[str, Mapping[str, str]]
) -> tuple[SliceMetrics, ...]:
    """The task's headline metrics of each slice."""
    task = model.family.task
    made = []
    for part in slices.make(predictions.details, predictions.keys, fields):
        records = [predictions.records[index] for index in part.indices]
        try:
            select = task.bootstrap_metrics(records, model.data)
            metrics = select(range(len(records)))
        except TesseraError:  # no metric can be computed of these images alone
            continue
        resampled = bootstrap.resampled_metrics(
            select,
            len(records),
            min(SLICE_RESAMPLES, task.bootstrap_samples),
            with_replacement=task.resample_with_replacement,
        )
        headline = {name: metrics[name] for name in task.headline_metrics if name in metrics}
        estimates = bootstrap.estimates(headline, resampled)
        made.append(SliceMetrics(part.by, part.name, part.span, len(records), estimates))
    return tuple(made)


def _check_comparable(first: EvaluationResult, other: EvaluationResult) -> None:
    if other.task != first.task:
        raise UsageError(
            f"the task of {other.model} is {other.task.replace('_', ' ')}, that of {first.model} "
            f"is {first.task.replace('_', ' ')}: they have no metric in common",
            hint="evaluate models of one task side by side",
        )
    if other.judge_digest != first.judge_digest:
        raise UsageError(
            f"{other.model} and {first.model} have different judges",
            hint="train both with the same judge",
        )


def _compare(first: EvaluatedModel, second: EvaluatedModel, confidence: float) -> Comparison:
    test = None
    if first.result.task == "classification":
        correct = [
            [record["predicted"] == record["label"] for record in one.predictions.records]
            for one in (first, second)
        ]
        test = bootstrap.mcnemar(*correct)
    differences = bootstrap.differences(
        (first.metrics, second.metrics), (first.resampled, second.resampled), confidence
    )
    return Comparison(first.result.model, second.result.model, differences, test)
