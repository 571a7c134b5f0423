"""Verification: whether two images show the same thing, and which of the known ones an image shows.

In: uint8 images with a `label` each; later an embedding of each image. Out: the images as the
network sees them, the metrics, and predictions as JSON. Must not know any network. The classes of
the images that are compared can differ from those of the training.

    B images, N images of a whole split, K classes of them, D numbers of an embedding

A sample has `label`, an int in [0, K); a batch has `label` (B,) int64. A prediction has `embedding`
(D,) float32 of unit length, on the CPU. The similarity of two images is the cosine of their
embeddings.

All metrics are exact functions of the embeddings, rounded to multiples of 2^-24: their products are
then integers, which float64 adds without rounding in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.core.errors import TesseraError, UsageError
from models.core.family import (
    Batch,
    BatchRng,
    Chart,
    DataSpec,
    Metric,
    Panel,
    Prediction,
    RandomCrop,
    Record,
    Target,
    Task,
    Transform,
)
from models.tasks.classification import CLASSIFICATION, ClassificationAugment
from models.transforms.colour import ColourSettings

BINS = 1 << 16
"""Bins for similarities from -1 to 1, so thresholds have a resolution of 2^-15 = 0.00003."""
SHOTS = 5
EPISODES = 100
NEIGHBOURS = 8
"""Images returned as related to an image."""
_GRID = 1 << 24
_BLOCK = 1 << 22
"""Similarities in memory at a time: 32 MiB."""


@dataclass(frozen=True)
class VerificationAugment(ColourSettings):
    flip: bool = False
    """Mirror half of the training images, left to right."""
    crop_padding: int = 0
    """Shift training images by up to so many pixels each way. The border is filled by
    reflection."""
    rotate: float = 0.0
    """Rotate by up to so many degrees each way."""
    shear: float = 0.0
    """Shear by up to so many pixels for each pixel."""
    zoom: float = 0.0
    """Make each side longer or shorter by up to this share."""
    cutout: int = 0
    """Side in pixels of a random square that is blanked; 0 for none."""
    crop: Literal["none", "random_resized"] = "none"
    """`random_resized` trains on random parts of the images, cut out at the images' own size and
    then resized. `none` trains on whole images, resized as `data.fit` says."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random part, as a share of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of width to height of a random part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.as_classification()
        for name, most in {"rotate": 180.0, "shear": 1.0, "zoom": 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(
                    f"augment.{name} = {getattr(self, name)}", hint=f"give 0 to {most:g}"
                )

    @property
    def warps(self) -> bool:
        return bool(self.rotate or self.shear or self.zoom)

    def as_classification(self) -> ClassificationAugment:
        known = {field.name for field in fields(ClassificationAugment)}
        return ClassificationAugment(**{n: v for n, v in vars(self).items() if n in known})


class Verification(Task):
    name = "verification"
    reads = "classification"
    has_positions = False
    bootstrap_samples = 100
    resample_with_replacement = False
    output_name = "embedding"
    primary = Metric("eer", "min")
    extra_metrics = ("few_shot_5",)
    augment_settings = VerificationAugment
    knows_classes = False

    def targets(self, batch: Batch) -> list[Target]:
        return [{"label": label} for label in batch["label"].tolist()]

    def augment(self, settings: VerificationAugment, data: DataSpec, *, train: bool) -> Transform:
        plain = CLASSIFICATION.augment(settings.as_classification(), data, train=train)
        if not (train and settings.warps):
            return plain

        def warped(batch: Batch, rng: BatchRng) -> Batch:
            batch = plain(batch, rng)
            return {**batch, "image": _warp(batch["image"], settings, rng)}

        return warped

    def crop(self, settings: VerificationAugment) -> RandomCrop | None:
        return settings.as_classification().random_crop

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """`embedding` (D,), `label`, and `class`, its name."""
        label = target["label"]
        return {"embedding": prediction["embedding"], "label": label, "class": _name(label, data)}

    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """Of all pairs of images, where a pair is accepted as one class above a similarity:

        - `eer`, the equal error rate, and `threshold`, its similarity: there the share of accepted
          pairs of two classes equals the share of rejected pairs of one class
        - `tar_far_1e2`, `tar_far_1e3`: the share of accepted pairs of one class where at most 0.01
          or 0.001 of the others are accepted

        `recall_at_1`: of the images with another one of their class, the share whose nearest image
        is of that class; a tie with another class is a miss. `few_shot_5`, if at least two classes
        have more than 5 images: the accuracy of the nearest class prototype, the normalised mean of
        5 images, on all other images of these classes (Snell et al., Prototypical Networks for
        Few-shot Learning, 2017); the mean over 100 random choices with a fixed seed.

        Time grows with N^2: about 2 s for 10,000 images of D = 64 on one core. Raises TesseraError
        if there is no pair of one class, or none of two.
        """
        labels, rows = _sort(records)
        pairs = _compare_all(labels, rows)
        same, other = int(pairs.same.sum()), int(pairs.other.sum())
        if not same or not other:
            raise TesseraError(
                f"the {len(records)} images of the split have no two of "
                + ("different classes" if same else "one class"),
                hint="verification compares images of one class with each other and with others",
            )
        # The accepted share with each edge of a bin as threshold; at the last edge it is 0.
        tar, far = (_from_each_edge(counts) for counts in (pairs.same, pairs.other))
        eer, threshold = _equal_error(far, 1 - tar)
        metrics = {"eer": eer, "threshold": threshold}
        for name, rate in (("tar_far_1e2", 1e-2), ("tar_far_1e3", 1e-3)):
            metrics[name] = float(tar[(far <= rate).nonzero()[0, 0]])
        metrics["recall_at_1"] = pairs.hits / pairs.queries
        accuracy = _few_shot(labels, rows)
        return metrics if accuracy is None else {**metrics, f"few_shot_{SHOTS}": accuracy}

    def charts(self, records: Sequence[Record], data: DataSpec) -> list[Chart]:
        """The ROC curve: accepted pairs of one class over accepted pairs of two classes."""
        pairs = _compare_all(*_sort(records))
        tar, far = (_from_each_edge(counts).tolist() for counts in (pairs.same, pairs.other))
        return [Chart("Accepted pairs", "of two classes", "of one class", {"": (far, tar)})]

    def error_score(self, record: Record) -> float:
        """0, because a single image can't be right or wrong. The report therefore shows the first
        images, each beside the most similar ones."""
        return 0.0

    def related_images(self, records: Sequence[Record], position: int) -> list[tuple[int, str]]:
        """The most similar other images, captioned "SIMILARITY CLASS"."""
        embeddings = torch.stack([record["embedding"] for record in records])
        similarity = embeddings @ embeddings[position]
        order = similarity.argsort(descending=True, stable=True)[: NEIGHBOURS + 1].tolist()
        return [
            (i, f"{float(similarity[i]):.2f} {records[i]['class']}") for i in order if i != position
        ][:NEIGHBOURS]

    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """`embedding`, a list of D numbers."""
        return {"embedding": prediction["embedding"].tolist()}

    def panels(
        self,
        image: Tensor,
        prediction: Prediction | None,
        target: Target | None,
        data: DataSpec,
    ) -> list[Panel]:
        """The image, captioned with its class if that is known."""
        return [Panel(image, _name(target["label"], data) if target else "")]


VERIFICATION = Verification()


def _warp(images: Tensor, settings: VerificationAugment, rng: BatchRng) -> Tensor:
    """(B, C, H, W): each rotated, sheared and zoomed at random about its centre, with reflection at
    the edges."""
    angle, slant, *zooms = (rng.uniform(4) * 2 - 1).unbind(1)
    angle = angle * math.radians(settings.rotate)
    high, wide = (torch.exp(zoom * math.log1p(settings.zoom)) for zoom in zooms)
    sine, cosine, slant = angle.sin(), angle.cos(), slant * settings.shear
    ratio = images.shape[-2] / images.shape[-1]  # a grid goes from -1 to 1, whatever the sides
    zero = torch.zeros_like(angle)
    rows = (
        torch.stack([cosine * wide, (cosine * slant - sine) * high * ratio, zero], 1),
        torch.stack([sine * wide / ratio, (sine * slant + cosine) * high, zero], 1),
    )
    moves = torch.stack(rows, 1).to(images.device, non_blocking=True)
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _name(label: int, data: DataSpec) -> str:
    """The name of the class, or its index if it is not one of the training classes."""
    return data.classes[label] if 0 <= label < len(data.classes) else f"class {label}"


def _sort(records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """Labels (N,) and embeddings (N, D), integers as float64, sorted by class and then by value, so
    that nothing depends on the order of the records."""
    if not records:
        raise TesseraError("there are no predictions to compute metrics of")
    stacked = torch.stack([record["embedding"] for record in records])
    if not stacked.isfinite().all():
        raise TesseraError("embeddings are not finite", hint="train with a lower learning rate")
    rows = (stacked.double() * _GRID).round()
    labels = [int(record["label"]) for record in records]
    first, raw = rows[:, 0].tolist(), [row.tobytes() for row in rows.numpy()]
    order = sorted(range(len(records)), key=lambda i: (labels[i], first[i], raw[i]))
    return torch.tensor(labels)[order], rows[order]


class _Pairs(NamedTuple):
    """Pairs of one class (`same`) and of two (`other`) by similarity: (BINS,) int64 each, every
    pair twice. `queries`: images with another one of their class; `hits`: those whose nearest image
    is."""

    same: Tensor
    other: Tensor
    queries: int
    hits: int


def _compare_all(labels: Tensor, rows: Tensor) -> _Pairs:
    """Compares every image with every other. `labels` (N,) are sorted, so the images of a class are
    adjacent columns."""
    count = len(rows)
    same, total = torch.zeros(2, BINS, dtype=torch.int64)
    begins = torch.searchsorted(labels, labels)
    ends = torch.searchsorted(labels, labels, right=True)
    hits = 0
    step = max(_BLOCK // count, 1)
    for start in range(0, count, step):
        stop = min(start + step, count)
        low, high = int(begins[start]), int(ends[stop - 1])
        products = rows[start:stop] @ rows.T
        own = labels[start:stop, None] == labels[None, low:high]
        own.diagonal(start - low).fill_(False)
        near = products[:, low:high]
        nearest_own = near.masked_fill(~own, -torch.inf).amax(1)
        bins = products * (BINS / 2 / _GRID**2) + BINS / 2  # exact: factors are powers of two
        bins = bins.clamp_(0, BINS - 1).long()
        same += torch.bincount(bins[:, low:high][own], minlength=BINS)
        total += torch.bincount(bins.flatten(), minlength=BINS)
        total -= torch.bincount(bins.diagonal(start), minlength=BINS)
        own.diagonal(start - low).fill_(True)
        near.masked_fill_(own, -torch.inf)
        hits += int((nearest_own > products.amax(1)).sum())
    return _Pairs(same, total - same, int((ends - begins > 1).sum()), hits)


def _from_each_edge(counts: Tensor) -> Tensor:
    """(BINS + 1,) float64: the share at or above each edge of the bins."""
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return (below[-1] - below).double() / int(below[-1])


def _equal_error(far: Tensor, frr: Tensor) -> tuple[float, float]:
    """(equal error rate, its similarity) from the false accept and false reject rates at each edge.

    Interpolates linearly between two edges; if the rates are equal at several edges, takes the
    middle of these.
    """
    first = int((frr >= far).nonzero()[0, 0])
    last = int((frr <= far).nonzero()[-1, 0])
    if first <= last:
        rate, edge = float(far[first]), (first + last) / 2
    else:
        gap = float(far[last] - frr[last])
        share = gap / (gap + float(frr[first] - far[first]))
        rate = float(far[last]) + share * float(far[first] - far[last])
        edge = last + share
    return rate, edge / (BINS / 2) - 1


def _few_shot(labels: Tensor, rows: Tensor) -> float | None:
    """Mean accuracy over `EPISODES` random choices; None if fewer than two classes have enough
    images."""
    numbers, sizes = _number(labels)
    enough = (sizes > SHOTS)[numbers]
    rows, (labels, sizes) = rows[enough], _number(labels[enough])
    count, classes = len(rows), len(sizes)
    if classes < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    starts = sizes.cumsum(0) - sizes
    hits, step = 0, max(_BLOCK // classes, 1)
    for _ in range(EPISODES):
        shuffled = (labels + torch.rand(count, generator=generator, dtype=torch.float64)).argsort()
        chosen = shuffled[starts[:, None] + torch.arange(SHOTS)]
        prototypes = rows[chosen].sum(1)
        prototypes /= (prototypes**2).sum(1, keepdim=True).sqrt().clamp_min(1)
        is_query = torch.ones(count, dtype=torch.bool).index_fill_(0, chosen.flatten(), False)
        queries = is_query.nonzero()[:, 0]
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            similarity = rows[part] @ prototypes.T
            truth = similarity.gather(1, labels[part, None])
            others = similarity.scatter_(1, labels[part, None], -torch.inf)
            hits += int((truth[:, 0] > others.amax(1)).sum())
    return hits / (EPISODES * (count - SHOTS * classes))


def _number(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted labels (N,) renumbered from 0 without gaps, and the number of images of each."""
    if not len(labels):
        return labels, labels
    new = torch.cat([labels.new_zeros(1), (labels[1:] != labels[:-1]).long()])
    numbers = new.cumsum(0)
    return numbers, numbers.bincount()
