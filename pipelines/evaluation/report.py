"""The report of an evaluation: one HTML page that opens offline, and its data as JSON.

In: evaluated models and their comparisons. Out: `report.html`, `report.json` and images in a
folder. Must not know how anything was measured, or where the files go.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.core.family import Batch, Panel
from pipelines.evaluation import results, saliency
from pipelines.evaluation.bootstrap import CONFIDENCE, Difference, Estimate
from pipelines.evaluation.corruptions import STRENGTHS
from pipelines.evaluation.evaluated import EvaluatedModel
from pipelines.evaluation.results import Comparison, EvaluationResult
from pipelines.interfaces import World
from pipelines.training import previews
from pipelines.training.evaluator import Predictions
from pipelines.training.loaded_model import LoadedModel
from pipelines.visuals import confusion, html, plots

PAGE, DATA = "report.html", "report.json"
WORST = 24
LISTED_CLASSES = 100


@dataclass(frozen=True)
class Cell:
    """A value and its interval; `mark` is "better" or "worse" if a difference is significant."""

    text: str
    span: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of a name and one cell per head."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Plot:
    """An image in the page, with its data in `src`."""

    title: str
    src: str
    note: str = ""


def write(
    folder: Path, evaluated: Sequence[EvaluatedModel], compared: Sequence[Comparison], split: str
) -> None:
    """Creates the folder and writes page, data and images."""
    folder.mkdir(parents=True, exist_ok=True)
    evaluations = [one.result for one in evaluated]
    plain = {
        "models": [results.to_plain(one) for one in evaluations],
        "comparisons": [results.to_plain(one) for one in compared],
    }
    text = json.dumps(plain, indent=1, sort_keys=True, allow_nan=False)
    (folder / DATA).write_text(text + "\n", encoding="utf-8")
    drawn = [list(_draw(folder, number, one, split)) for number, one in enumerate(evaluated)]
    page = render(evaluations, compared, drawn)
    (folder / PAGE).write_text(page, encoding="utf-8")


def render(
    evaluations: Sequence[EvaluationResult],
    compared: Sequence[Comparison],
    drawn: Sequence[Sequence[Plot]],
) -> str:
    """Renders the page. `drawn` has the plots of each model."""
    return html.render(
        Path(__file__).with_name("report.html.j2"),
        models=evaluations,
        first=evaluations[0],
        metrics=_metrics(evaluations, compared),
        classes=_classes(evaluations),
        slices=_slices(evaluations),
        corruptions=_corruptions(evaluations),
        attacks=_attacks(evaluations),
        costs=_costs(evaluations),
        mcnemar=[(one.second, one.mcnemar) for one in compared if one.mcnemar],
        shown=list(zip(evaluations, drawn)),
        confidence=f"{CONFIDENCE:.0%}",
        strengths=STRENGTHS,
    )


def _metrics(evaluations: Sequence[EvaluationResult], compared: Sequence[Comparison]) -> Table:
    """Metrics of all images: of each model, then the first one's difference to each other."""
    names = [name for name in evaluations[0].metrics if "/" not in name]
    heads = [one.model for one in evaluations] + [f"difference to {one.second}" for one in compared]
    rows = []
    for name in names:
        cells = [_estimate(one.metrics.get(name)) for one in evaluations]
        cells += [_difference(name, one.metrics.get(name), evaluations[0]) for one in compared]
        rows.append((name, cells))
    return Table(heads, rows)


def _classes(evaluations: Sequence[EvaluationResult]) -> Table | None:
    """Metrics `NAME/CLASS` by class, for each model and name."""
    kinds: list[str] = []
    classes: list[str] = []
    for one in evaluations:
        for name in one.metrics:
            kind, slash, of = name.partition("/")
            if slash:
                kinds += [kind] if kind not in kinds else []
                classes += [of] if of not in classes else []
    if not classes:
        return None
    many = len(evaluations) > 1
    heads = [f"{kind}: {one.model}" if many else kind for kind in kinds for one in evaluations]
    rows = [
        (of, [_estimate(one.metrics.get(f"{kind}/{of}")) for kind in kinds for one in evaluations])
        for of in classes[:LISTED_CLASSES]
    ]
    return Table(heads, rows)


def _slices(evaluations: Sequence[EvaluationResult]) -> list[tuple[str, Table]]:
    """For each trait or field, the primary metric of each slice."""
    primary = evaluations[0].primary
    by: dict[str, list[tuple[str, list[Cell]]]] = {}
    for index, part in enumerate(evaluations[0].slices):
        cells = [Cell(f"{part.samples:,}")]
        for one in evaluations:
            own = one.slices[index].metrics if index < len(one.slices) else {}
            cells.append(_estimate(own.get(primary)))
        name = f"{part.name} ({part.span})" if part.span else part.name
        by.setdefault(part.by, []).append((name, cells))
    heads = ["images", *(one.model for one in evaluations)]
    return [(name, Table(heads, rows)) for name, rows in by.items()]


def _corruptions(evaluations: Sequence[EvaluationResult]) -> list[tuple[EvaluationResult, Table]]:
    heads = [f"strength {strength}" for strength in STRENGTHS]
    tables = []
    for one in evaluations:
        if one.robustness and one.robustness.corrupted:
            rows = [
                (kind.replace("_", " "), [Cell(number(value)) for value in values])
                for kind, values in one.robustness.corrupted.items()
            ]
            tables.append((one, Table(heads, rows)))
    return tables


def _attacks(evaluations: Sequence[EvaluationResult]) -> Table | None:
    robust = [one.robustness for one in evaluations if one.robustness and one.robustness.attacked]
    if len(robust) != len(evaluations):
        return None
    rows = [("unchanged", [Cell(number(one.clean)) for one in robust])]
    for name in robust[0].attacked:
        kind, _, levels = name.rpartition("_")
        row = [Cell(number(one.attacked.get(name, math.nan))) for one in robust]
        rows.append((f"{kind.upper()}, {levels} of 255", row))
    return Table([one.model for one in evaluations], rows)


def _costs(evaluations: Sequence[EvaluationResult]) -> Table | None:
    names = [name for name in evaluations[0].costs if any(name in one.costs for one in evaluations)]
    if not names:
        return None
    rows = [
        (
            name.replace("_", " "),
            [Cell(_cost(one.costs.get(name, math.nan))) for one in evaluations],
        )
        for name in names
    ]
    return Table([one.model for one in evaluations], rows)


def _estimate(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell("")
    return Cell(number(estimate.value), _span(estimate.low, estimate.high))


def _difference(name: str, difference: Difference | None, first: EvaluationResult) -> Cell:
    if difference is None:
        return Cell("")
    mark = ""
    if name == first.primary and not difference.low <= 0 <= difference.high:
        mark = "better" if (difference.low > 0) == (first.direction == "max") else "worse"
    text = f"{difference.value:+.4g}" if math.isfinite(difference.value) else ""
    return Cell(text, _span(difference.low, difference.high), mark)


def _span(low: float, high: float) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{number(low)} to {number(high)}"


def number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not known"


def _cost(value: float) -> str:
    if not math.isfinite(value):
        return "not known"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _draw(folder: Path, number: int, one: EvaluatedModel, split: str) -> Iterator[Plot]:
    """Draws a model's plots, each also as a file."""
    model, predictions = one.model, one.predictions
    task, data = model.family.task, model.data

    def path(name: str) -> Path:
        return folder / "pictures" / f"{name}-{number + 1}.png"

    charts = task.charts(predictions.records, data)
    if charts:
        plots.draw_charts(charts, path("charts"))
        yield Plot("Curves", _embed(path("charts")))
    matrix = task.confusion(predictions.records, data)
    if matrix is not None:
        confusion.confusion_matrix(matrix, data.classes, path("confusion_matrix"))
        yield Plot("Confusion", _embed(path("confusion_matrix")))
    groups, note = _worst(model, predictions, split)
    plots.grid(groups, data.classes, path("worst_mistakes"))
    yield Plot("The worst mistakes", _embed(path("worst_mistakes")), note)


def _worst(
    model: LoadedModel, predictions: Predictions, split: str
) -> tuple[list[list[Panel]], str]:
    """Panels of the predictions with the largest error; a classifier's with a saliency map."""
    family, data = model.family, model.data
    rows = predictions.worst(family, WORST)
    worst = np.array([predictions.indices[row] for row in rows], np.int64)

    def read(samples: np.ndarray[Any, Any]) -> list[Batch]:
        if not len(samples):
            return []
        return [batch for _, batch in model.loader(split, World(), only=samples).batches()]

    groups = previews.panels_of(family, data, read, model.evaluator, predictions, worst)
    if family.task.name != "classification":
        return groups, ""
    note, remaining = "", iter(groups)
    predicted = {
        index: record["predicted"]
        for index, record in zip(predictions.indices, predictions.records, strict=True)
    }
    for batch in read(worst):
        classes = torch.tensor([predicted[index] for index in batch["index"].tolist()])
        images = model.evaluator.transform(batch)["image"]
        heat = saliency.grad_cam(model.module, images, classes)
        if heat is None:
            break
        note = f"Beside each image: what the prediction depends on ({heat.kind})."
        for row, over in enumerate(heat.maps.cpu()):
            height, width = batch["extent"][row].tolist()
            image = batch["image"][row, :, :height, :width]
            next(remaining).append(Panel(_overlay(image, over[:height, :width])))
    return groups, note


def _overlay(image: Tensor, heat: Tensor) -> Tensor:
    """The image in grey with a map (H, W) of 0..1 in red over it: uint8 (3, H, W)."""
    grey = image.float().mean(0)
    red = torch.stack([grey * (1 - heat) + 255 * heat, grey * (1 - heat), grey * (1 - heat)])
    return red.round().clamp(0, 255).to(torch.uint8)


def _embed(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
