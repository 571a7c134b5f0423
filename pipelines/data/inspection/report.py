"""A packed data set as one HTML page that opens offline.

In: a `Survey`. Out: the page, of a few MB at most: images as `data:` addresses, no script, nothing
loaded from elsewhere. Must not know how the data set is read. Names and keys are not trusted: the
template escapes all of them, and the page's security policy forbids scripts and outside addresses.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

from pipelines.data.annotations import Mask, Objects
from pipelines.data.card import ANNOTATION_EXTENSIONS, Card
from pipelines.data.inspection.lists import CopyGroup, PairRow
from pipelines.data.inspection.panels import make_panel
from pipelines.data.inspection.survey import Sample, SplitSurvey, Survey
from pipelines.data.inspection.suspects import Suspect
from pipelines.visuals import html
from pipelines.visuals.draw import draw, hex_colour

TEMPLATE = "report.html.j2"
IMAGE_BYTES = 5_500_000
"""Limit for all embedded images together; later samples are listed without their image."""
LISTED_CLASSES, LISTED_ROWS = 1000, 200
MOST_BINS = 24
FEW_CLASSES, ENDS = 40, 10
"""With more than `FEW_CLASSES` classes, the `ENDS` largest and smallest are shown first."""
_SIDE, _PIXELATED = 320, 64
Array = np.ndarray[Any, Any]
_TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class EmbeddedImage:
    """An image of the page. If it is missing, `src` is empty and `note` has the reason."""

    src: str
    note: str
    pixelated: bool


@dataclass(frozen=True)
class Bin:
    """A bar of a histogram: its position and height as shares of the chart, and its range and count
    as text."""

    left: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    name: str
    low: str
    high: str
    bins: list[Bin]


def render(survey: Survey) -> str:
    """The page."""
    card, budget = survey.card, _ImageBudget(card_classes(survey.card))
    return html.render(
        Path(__file__).with_name(TEMPLATE),
        card=card,
        facts=list(facts(card)),
        suspects=[_suspect(one, sample, budget) for one, sample in survey.suspects],
        splits=[_split(split, card, budget) for split in survey.splits],
        classes=class_table(card, [split.name for split in survey.splits]),
        charts=_charts(survey.splits),
        shape=_shape(survey.splits),
        one_size=_one_size(card),
        pairs=[_pair(row, left, right, budget) for row, left, right in survey.pairs],
        copies=[_group(group, samples, budget) for group, samples in survey.copies if samples],
        copies_count=sum(len(group.images) - 1 for group, _ in survey.copies),
        groups_count=len(survey.copies),
        conflicts_count=sum(group.in_conflict for group, _ in survey.copies),
        account=survey.account,
        rejected=survey.rejected[:LISTED_ROWS],
        rejected_count=max(card.rejected, len(survey.rejected)),
        reasons=survey.reasons,
    )


def card_classes(card: Card) -> tuple[str, ...]:
    return tuple(html.line(name) for name in card.classes)


def facts(card: Card) -> Iterator[tuple[str, str]]:
    """Name and value of the facts about the whole data set."""
    image = card.image
    shards = [shard for split in card.splits.values() for shard in split.shards]
    total = sum(shard.size_bytes for shard in shards)
    yield "task", card.task.replace("_", " ")
    yield "images", f"{sum(split.samples for split in card.splits.values()):,}"
    if card.classes:
        yield "classes", f"{len(card.classes):,}"
    yield "pixels", f"{'grey' if image.channels == 1 else 'RGB'}, {image_span(card)}"
    yield "mean", ", ".join(f"{value:.4f}" for value in image.mean)
    yield "std", ", ".join(f"{value:.4f}" for value in image.std)
    yield "size", f"{megabytes(total)} in {len(shards):,} shard{'s' * (len(shards) != 1)}"
    yield "source", card.source
    for number, made in enumerate(card.corrections, 1):
        counts = f"{made.relabelled:,} relabelled, {made.dropped:,} dropped"
        yield f"correction {number}", counts
        yield f"correction {number} of", f"data set {made.data_digest}"
        yield f"correction {number} by", f"file with sha256 {made.file_sha256}"
    yield "shards in", card.root
    yield "licence", card.licence or "not given"
    yield "digest", card.digest


def image_span(card: Card) -> str:
    """Heights and widths of the images, in pixels."""
    image = card.image
    return (
        f"height {_span(image.min_height, image.max_height)}, "
        f"width {_span(image.min_width, image.max_width)}"
    )


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes < 1e10 else f"{size_bytes / 1e9:,.1f} GB"


@dataclass(frozen=True)
class ClassRow:
    """A class: its colour, and for each split (count as text, share of the split's largest)."""

    name: str
    tint: str
    cells: list[tuple[str, float]]
    missing: bool


@dataclass(frozen=True)
class ClassTable:
    """`unit` is what is counted. `ends` are the largest and the smallest classes of train, if there
    are too many to show; `rows` are all classes, or the first `LISTED_CLASSES`."""

    unit: str
    splits: list[str]
    ends: list[ClassRow]
    rows: list[ClassRow]
    total: int
    missing: int


def class_table(card: Card, splits: Sequence[str]) -> ClassTable:
    """How often each class occurs in each split."""
    unit = {"json": "objects", "mask.png": "share of the pixels"}
    counts = {
        split: [card.splits[split].class_counts.get(name, 0) for name in card.classes]  # type: ignore[index]
        for split in splits
    }
    sums = {split: sum(values) or 1 for split, values in counts.items()}
    tops = {split: max(values, default=0) or 1 for split, values in counts.items()}
    shares = ANNOTATION_EXTENSIONS.get(card.task) == "mask.png"

    def row(index: int) -> ClassRow:
        own = [(counts[split][index], split) for split in splits]
        cells = [
            (f"{100 * count / sums[split]:.2f} %" if shares else f"{count:,}", count / tops[split])
            for count, split in own
        ]
        tint = hex_colour(index)
        return ClassRow(
            html.line(card.classes[index]), tint, cells, not all(count for count, _ in own)
        )

    first = splits[0] if splits else ""
    by_count = sorted(range(len(card.classes)), key=lambda index: -counts[first][index])
    many = len(card.classes) > FEW_CLASSES
    ends = [*by_count[:ENDS], *by_count[-ENDS:]] if many else []
    return ClassTable(
        unit=unit.get(ANNOTATION_EXTENSIONS.get(card.task, ""), "images"),
        splits=list(splits),
        ends=[row(index) for index in ends],
        rows=[row(index) for index in range(min(len(card.classes), LISTED_CLASSES))],
        total=len(card.classes),
        missing=sum(
            not all(counts[s][index] for s in splits) for index in range(len(card.classes))
        ),
    )


class _ImageBudget:
    """Encodes images for the page until the limit is reached."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self._left = IMAGE_BYTES

    def embed(self, sample: Sample | None, missing: str = "") -> EmbeddedImage:
        if sample is None:
            return EmbeddedImage("", missing, False)
        image, tiny = sample.image, max(sample.image.size) <= _PIXELATED
        if tiny and sample.annotation is None:
            data, kind = _encoded(image, "PNG"), "png"
        else:
            side = min(_SIDE, max(image.size)) if sample.annotation is None else _SIDE
            panel = make_panel(image, sample.annotation, max_side=side)
            data = _encoded(draw(panel, self.classes, side=side), "JPEG")
            kind, tiny = "jpeg", False
        if len(data) > self._left:
            self._left = 0
            return EmbeddedImage("", "left out, or the page would be too large", False)
        self._left -= len(data)
        return EmbeddedImage(
            f"data:image/{kind};base64,{base64.b64encode(data).decode()}", "", tiny
        )


def _encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    # No chroma subsampling: thin lines would lose their colour.
    image.save(out, kind, **({"quality": 82, "subsampling": 0} if kind == "JPEG" else {}))
    return out.getvalue()


def _split(split: SplitSurvey, card: Card, budget: _ImageBudget) -> dict[str, Any]:
    shards = card.split(split.name).shards
    return {
        "name": split.name,
        "samples": split.samples,
        "shards": len(shards),
        "size": megabytes(sum(shard.size_bytes for shard in shards)),
        "shown": [_tile(sample, budget) for sample in split.shown],
    }


def _tile(sample: Sample, budget: _ImageBudget) -> dict[str, Any]:
    annotation, labels = sample.annotation, []
    if isinstance(annotation, Objects):
        labels = annotation.labels.tolist()
    elif isinstance(annotation, Mask):
        values = np.flatnonzero(np.bincount(annotation.pixels.ravel())).tolist()
        labels = [value for value in values if value < len(budget.classes)]
    elif sample.label >= 0:
        labels = [sample.label]
    present = sorted(set(labels), key=lambda label: (-labels.count(label), label))
    chips = []
    for label in present:
        times = labels.count(label)
        name = budget.classes[label] + (f" {_TIMES} {times}" if times > 1 else "")
        chips.append((name, hex_colour(label)))
    nothing = "no objects" if isinstance(annotation, Objects) and not labels else ""
    return {
        "image": budget.embed(sample),
        "key": html.line(unquote(sample.key)),
        "size": f"{sample.image.width} {_TIMES} {sample.image.height}",
        "chips": chips[:6],
        "more": max(len(chips) - 6, 0),
        "nothing": nothing,
    }


def _suspect(suspect: Suspect, sample: Sample, budget: _ImageBudget) -> dict[str, Any]:
    return {
        **_tile(sample, budget),
        "split": suspect.split,
        "suggested": html.line(suspect.suggested),
        "tint": hex_colour(budget.classes.index(html.line(suspect.suggested))),
        "margin": f"{suspect.margin:.3f}",
    }


def _pair(
    row: PairRow, left: Sample | None, right: Sample | None, budget: _ImageBudget
) -> dict[str, Any]:
    missing = "not read for this page"
    sides = [
        {
            # Without annotations, which would hide how similar the images are.
            "image": budget.embed(sample and replace(sample, annotation=None), missing),
            "split": html.line(side.split),
            "key": html.line(unquote(side.key)),
            "origin": html.line(side.origin),
        }
        for side, sample in ((row.left, left), (row.right, right))
    ]
    return {"sides": sides, "distance": row.distance}


def _group(group: CopyGroup, samples: Sequence[Sample], budget: _ImageBudget) -> dict[str, Any]:
    return {
        "split": html.line(group.split),
        "in_conflict": group.in_conflict,
        "tiles": [_tile(sample, budget) for sample in samples],
        "more": len(group.images) - len(samples),
    }


def _shape(splits: Sequence[SplitSurvey]) -> str:
    """Aspect ratio of the frames: the median of the images, limited to 0.75 to 1.6."""
    shapes = [width / height for split in splits for height, width in split.sizes]
    return f"{min(max(float(np.median(shapes)), 0.75), 1.6):.3f}"


def _one_size(card: Card) -> str:
    image = card.image
    same = (image.min_width, image.min_height) == (image.max_width, image.max_height)
    return f"{image.min_width} {_TIMES} {image.min_height}" if same else ""


def _charts(splits: Sequence[SplitSurvey]) -> list[tuple[SplitSurvey, list[Histogram]]]:
    """The histograms of each split. Those of one kind have the same range in all splits."""
    kinds: list[tuple[str, list[Sequence[float]], bool, bool]] = []
    if len({size for split in splits for size in split.sizes}) > 1:
        kinds += [
            (
                "longer side, pixels",
                [[max(s) for s in split.sizes] for split in splits],
                True,
                False,
            ),
            ("width : height", [[w / h for h, w in split.sizes] for split in splits], False, False),
        ]
    kinds += [
        ("objects in an image", [split.objects for split in splits], False, True),
        ("√ of box area, pixels", [split.box_sides for split in splits], True, False),
    ]
    drawn: list[list[Histogram]] = [[] for _ in splits]
    for name, columns, spread, whole in kinds:
        every = [value for values in columns for value in values]
        if len(set(every)) < 2:
            continue
        for index, values in enumerate(columns):
            if values:
                edges = bin_edges(min(every), max(every), spread=spread, whole=whole)
                drawn[index].append(histogram(name, values, edges, whole=whole))
    return list(zip(splits, drawn))


def bin_edges(low: float, high: float, *, spread: bool = False, whole: bool = False) -> Array:
    """Edges of at most `MOST_BINS` bins from `low` to `high`: of equal width, or of equal ratio
    with `spread`; with `whole` the edges are integers. `high` must be larger than `low`."""
    if whole:
        step = math.ceil((high - low + 1) / MOST_BINS)
        return np.arange(low, high + step + 1, step, dtype=np.float64)
    return (np.geomspace if spread else np.linspace)(low, high, MOST_BINS + 1)


def histogram(
    name: str, values: Sequence[float], edges: Array, *, whole: bool = False
) -> Histogram:
    """How many values are in each bin. Values outside of the edges count in the outer bins."""
    # Rounding in the edges must not put the largest value outside.
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    top, width = int(counts.max()), 1 / len(counts)
    bins = [
        Bin(
            index * width, width, int(count) / top, f"{_range(edges, index, whole)}: {int(count):,}"
        )
        for index, count in enumerate(counts)
        if count
    ]
    return Histogram(name, _number(float(edges[0])), _number(float(edges[-1]) - whole), bins)


def _range(edges: Array, index: int, whole: bool) -> str:
    low, high = float(edges[index]), float(edges[index + 1]) - whole
    return _number(low) if low == high else f"{_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
