"""One or several models, examined on the same images of a split.

In: model folders and a packed data set, named by a payload of plain JSON. Out: an `EvaluationResult` of
each model, a `Comparison` of the first with each other, and the report's files. It is one job: every
rank asks about its part of the images, rank 0 counts. Must not know what the report is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.core.errors import TesseraError, UsageError
from models.core.family import Batch, Prediction, Target
from models.metrics import custom as custom_metrics
from pipelines.data.loading.loaders import EvalLoader
from pipelines.evaluation import attacks, bootstrap, corruptions, costs, gradients, results, slices
from pipelines.evaluation.bootstrap import Array
from pipelines.evaluation.results import Comparison, EvaluationResult, Robustness, SliceMetrics
from pipelines.interfaces import Emit, World
from pipelines.storage.base import use_cache_of
from pipelines.training import distributed, evaluator, hardware, loaded_model
from pipelines.training.evaluator import Predictions
from pipelines.training.loaded_model import LoadedModel

LARGEST_BATCH = 256
EPSILONS = (2, 8)
"""Of the attacks: the largest change of a channel, of 255 levels."""
SLICE_RESAMPLES = 200


@dataclass(frozen=True)
class _Evaluated:
    """One model while others are compared with it. All but the subject is rank 0's."""

    subject: LoadedModel
    answers: Predictions
    whole: dict[str, float]
    drawn: dict[str, Array]
    found: EvaluationResult


def evaluate_models(payload: dict[str, Any], world: World, emit: Emit) -> dict[str, Any]:
    """Called by all ranks.

    payload: `models`, each with `name`, `model` (folder), `digest` and, where the task is judged,
    `judge` (folder); `data`, `split`, `cache` for remote shards; `intervals`, whether they and slices
    are made; `robustness`, how many images are spoiled, 0 for none; `costs`, whether time and memory
    are measured; `fields`, name -> key -> value, to slice by; `confidence` of the differences;
    `report`, a folder for the page and its data, or none. Gives `models` and `comparisons` as plain
    JSON.
    """
    use_cache_of(payload.get("cache", {}))
    examined: list[_Evaluated] = []
    for told in payload["models"]:
        one = _evaluate(told, payload, world)
        if one is not None:
            _check_comparable(examined, one)
            examined.append(one)
    if not world.leads:
        return {}
    confidence = float(payload.get("confidence", bootstrap.CONFIDENCE))
    compared = [_compare(examined[0], other, confidence) for other in examined[1:]]
    if payload.get("report"):
        from pipelines.evaluation import report

        report.write(
            Path(payload["report"]),
            [(one.subject, one.answers, one.found) for one in examined],
            compared,
            payload["split"],
        )
    return {
        "models": [results.to_plain(one.found) for one in examined],
        "comparisons": [results.to_plain(one) for one in compared],
    }


def _evaluate(
    told: Mapping[str, Any], payload: Mapping[str, Any], world: World
) -> _Evaluated | None:
    split = payload["split"]
    subject = loaded_model.load_model(
        Path(told["model"]), told["digest"], payload["data"], world, judge=told.get("judge")
    )
    task, data = subject.family.task, subject.data
    note = slices.describe if task.takes_images else None
    loader = subject.loader(split, world)
    answers = evaluator.predict_split(
        subject.family, subject.evaluator, data, loader, world, describe=note
    )
    robust = _robustness(subject, split, int(payload.get("robustness", 0)), world)
    measured: dict[str, float] = {}
    if payload.get("costs") and world.leads:
        measured = _costs(subject, Path(told["model"]), split)
    distributed.broadcast(None, world)  # the others wait, and take no time from what is timed
    if answers is None:
        return None
    custom = subject.model.recipe.metrics
    select = custom_metrics.bootstrap_metrics(task, custom, answers.records, data)
    count = len(answers.records)
    whole = select(range(count))
    bootstrap_samples = task.bootstrap_samples if payload.get("intervals", True) else 0
    drawn = bootstrap.resampled_metrics(
        select, count, bootstrap_samples, twice=task.resample_with_replacement
    )
    found = EvaluationResult(
        model=told["name"],
        digest=subject.model.digest,
        family=subject.family.name,
        task=task.name,
        primary=task.primary.name,
        direction=task.primary.direction,
        data=subject.card.name,
        data_digest=subject.card.digest,
        split=split,
        samples=count,
        metrics=bootstrap.estimates(whole, drawn),
        slices=_slices(subject, answers, payload.get("fields", {})) if bootstrap_samples else (),
        robustness=robust,
        costs=measured,
        hardware=hardware.describe(),
        judge_digest=subject.model.recipe.judge_digest,
    )
    return _Evaluated(subject, answers, whole, drawn, found)


def _costs(subject: LoadedModel, folder: Path, split: str) -> dict[str, float]:
    """Of the network with what it does after its last layer, on images as it sees them; reading,
    decoding and preparing them isn't in it."""
    few = np.arange(min(subject.card.split(split).samples, subject.family.task.eval_batch))
    (_, batch), *_ = subject.loader(split, World(), only=few).batches()
    seen, rows = subject.evaluator.transform(batch), len(few)

    def take(count: int) -> Batch:
        places = [place % rows for place in range(count)]
        return {
            name: value[places] if isinstance(value, Tensor) else [value[place] for place in places]
            for name, value in seen.items()
        }

    def ask(batch: Batch) -> object:
        with torch.no_grad():
            return subject.family.predict(subject.module, batch)

    device = str(next(subject.module.parameters()).device)
    with gradients.answering(subject.module):
        time = costs.latency(ask, take(1), device, seconds=1.0)
        most = costs.throughput(ask, take, device, largest=LARGEST_BATCH, seconds=0.5)
        memory = costs.peak_memory(ask, take(1), device)
        found: dict[str, float] = {
            "parameters": costs.parameters(subject.module),
            "flops": costs.flops(ask, take(1)),
            "size_bytes": costs.size_bytes(folder),
            "latency_p50_ms": time.p50_milliseconds,
            "latency_p95_ms": time.p95_milliseconds,
            "images_per_second": most.images_per_second,
            "best_batch": most.batch_size,
        }
    if memory:
        found["peak_memory_bytes"] = memory.peak_bytes
    return found


def _slices(
    subject: LoadedModel, answers: Predictions, fields: Mapping[str, Mapping[str, str]]
) -> tuple[SliceMetrics, ...]:
    """The task's headline figures of each slice."""
    task = subject.family.task
    found = []
    for part in slices.make(answers.details, answers.keys, fields):
        records = [answers.records[place] for place in part.places]
        try:
            select = task.bootstrap_metrics(records, subject.data)
            whole = select(range(len(records)))
        except TesseraError:  # of these images alone no figure can be made
            continue
        draws = min(SLICE_RESAMPLES, task.bootstrap_samples)
        drawn = bootstrap.resampled_metrics(
            select, len(records), draws, twice=task.resample_with_replacement
        )
        known = {name: whole[name] for name in task.headline_metrics if name in whole}
        metrics = bootstrap.estimates(known, drawn)
        found.append(SliceMetrics(part.by, part.name, part.span, len(records), metrics))
    return tuple(found)


def _robustness(subject: LoadedModel, split: str, most: int, world: World) -> Robustness | None:
    """The primary figure on images that were spoiled; None where the truth is the image itself."""
    family, data = subject.family, subject.data
    if not most or family.task.reads == "images":
        return None
    samples = subject.card.split(split).samples
    chosen = np.unique(np.linspace(0, samples - 1, min(most, samples)).round().astype(np.int64))

    def metric(ask: evaluator.PredictBatch, loader: evaluator.Loader) -> float:
        answers = evaluator.predict_split(family, ask, data, loader, world)
        if answers is None:
            return 0.0
        return answers.metrics(family, data)[family.task.primary.name]

    def loader() -> EvalLoader:
        return subject.loader(split, world, only=chosen)

    clean = metric(subject.evaluator, loader())
    corrupted = {
        kind: tuple(
            metric(subject.evaluator, _Corrupted(loader(), kind, strength))
            for strength in corruptions.STRENGTHS
        )
        for kind in corruptions.kinds_for(data.channels)
    }
    attacked = {}
    if family.task.name == "classification":
        for kind in attacks.KINDS:
            for epsilon in EPSILONS:
                ask = _Attacked(subject, kind, epsilon)
                attacked[f"{kind}_{epsilon}"] = metric(ask, loader())
    return Robustness(len(chosen), clean, corrupted, attacked)


class _Corrupted:
    """The batches of a loader, their images spoiled."""

    def __init__(self, loader: EvalLoader, kind: str, strength: int) -> None:
        self._loader, self._kind, self._strength = loader, kind, strength

    def batches(self) -> Iterator[tuple[int, Batch]]:
        for number, batch in self._loader.batches():
            spoiled = corruptions.corrupt(
                batch["image"],
                self._kind,
                self._strength,
                batch["index"].tolist(),
                batch["extent"],
            )
            yield number, {**batch, "image": spoiled}


class _Attacked:
    """Asks about images that were changed so that this network errs."""

    def __init__(self, subject: LoadedModel, kind: str, epsilon: int) -> None:
        self._subject, self._kind, self._epsilon = subject, kind, epsilon

    def __call__(self, batch: Batch) -> tuple[list[Prediction], list[Target]]:
        subject = self._subject
        seen = subject.evaluator.transform(batch)
        seen["image"] = attacks.attacked(
            subject.family,
            subject.module,
            seen,
            subject.data,
            self._kind,
            self._epsilon / 255,
        )
        return subject.evaluator.predict_transformed(seen, batch)


def _check_comparable(others: list[_Evaluated], one: _Evaluated) -> None:
    if not others:
        return
    first = others[0]
    if one.found.task != first.found.task:
        raise UsageError(
            f"{one.found.model} does {one.found.task.replace('_', ' ')}, {first.found.model} does "
            f"{first.found.task.replace('_', ' ')}: they have no figure in common",
            hint="evaluate models of one task side by side",
        )
    if one.found.judge_digest != first.found.judge_digest:
        raise UsageError(
            f"{one.found.model} and {first.found.model} are judged by different classifiers",
            hint="train both with the same judge",
        )


def _compare(first: _Evaluated, second: _Evaluated, confidence: float) -> Comparison:
    test = None
    if first.found.task == "classification":
        rights = [
            [record["predicted"] == record["label"] for record in one.answers.records]
            for one in (first, second)
        ]
        test = bootstrap.mcnemar(*rights)
    metrics = bootstrap.differences(
        (first.whole, second.whole), (first.drawn, second.drawn), confidence
    )
    return Comparison(first.found.model, second.found.model, metrics, test)
