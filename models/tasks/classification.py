"""Classification: one class for each image.

In: uint8 images with a `label` each; later the predicted probabilities. Out: the images as the
network sees them, the metrics, and predictions as JSON. Must not know any network.

    B images, N images of a whole split, C channels, H height, W width, K classes

A sample has `label`, an int in [0, K). A batch has `label` (B,) int64, and `target` (B, K) float
with label smoothing. A prediction has `probabilities` (K,) float32 on the CPU and `label`, the most
probable class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from models.metrics.average_precision import NAMED_CLASSES, metric_names
from models.metrics.roc_auc import RocAuc
from models.transforms.colour import ColourSettings, change_colours, erase

CALIBRATION_BINS = 15
"""As in Guo et al., On Calibration of Modern Neural Networks, 2017."""
CHARTED_CLASSES = 10
"""More lines would be hard to distinguish."""


@dataclass(frozen=True)
class ClassificationAugment(ColourSettings):
    flip: bool = False
    """Mirror half of the training images, left to right."""
    crop_padding: int = 0
    """Shift training images by up to so many pixels each way. The border is filled by
    reflection."""
    cutout: int = 0
    """Side in pixels of a random square that is blanked; 0 for none."""
    label_smoothing: float = 0.0
    """Probability that is spread evenly over all classes."""
    crop: Literal["none", "random_resized"] = "none"
    """`random_resized` trains on random parts of the images, cut out at the images' own size and
    then resized. `none` trains on whole images, resized as `data.fit` says."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random part, as a share of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of width to height of a random part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in {"crop_padding": self.crop_padding, "cutout": self.cutout}.items():
            if value < 0:
                raise UsageError(f"augment.{name} = {value}", hint="give 0 or more pixels")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(
                f"augment.label_smoothing = {self.label_smoothing}", hint="give 0 or more, below 1"
            )
        RandomCrop(self.crop_scale, self.crop_ratio)  # raises UsageError

    @property
    def random_crop(self) -> RandomCrop | None:
        return RandomCrop(self.crop_scale, self.crop_ratio) if self.crop != "none" else None


class Classification(Task):
    name = "classification"
    reads = "classification"
    has_positions = False
    output_name = "probabilities"
    primary = Metric("accuracy", "max")
    augment_settings = ClassificationAugment

    def targets(self, batch: Batch) -> list[Target]:
        return [{"label": label} for label in batch["label"].tolist()]

    def augment(self, settings: ClassificationAugment, data: DataSpec, *, train: bool) -> Transform:
        if settings.crop_padding >= min(data.height, data.width):
            raise UsageError(
                f"augment.crop_padding = {settings.crop_padding} for images of "
                f"{data.height} by {data.width} pixels",
                hint=f"give at most {min(data.height, data.width) - 1}",
            )
        return _Augment(settings if train else ClassificationAugment(), data)

    def crop(self, settings: ClassificationAugment) -> RandomCrop | None:
        return settings.random_crop

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """`probabilities` (K,), `predicted` and `label`, the indices of the predicted and the true
        class."""
        predicted, label, classes = prediction["label"], target["label"], len(data.classes)
        for name, index in (("target", label), ("prediction", predicted)):
            if not 0 <= index < classes:
                raise TesseraError(f"a {name} has class {index}, but there are {classes} classes")
        return {
            "probabilities": prediction["probabilities"],
            "predicted": predicted,
            "label": label,
        }

    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """`accuracy`; `loss`, the mean negative log-likelihood in nats; `precision`, `recall` and
        `f1`, macro averages over the classes that occur; `balanced_accuracy`, the mean recall of
        the classes that images have; Cohen's `kappa`; `roc_auc`, the macro average of each class
        against the rest; `calibration_error`, the expected calibration error over 15 bins; `top5`
        if there are more than 5 classes.

        Sums are exact, so the order of the images and the number of threads change no digit.
        """
        metrics = self.bootstrap_metrics(records, data)(range(len(records)))
        return {name: value for name, value in metrics.items() if "/" not in name}

    def bootstrap_metrics(
        self, records: Sequence[Record], data: DataSpec
    ) -> Callable[[Sequence[int]], dict[str, float]]:
        """Also `recall/CLASS` and `precision/CLASS` of the first 50 classes, if they occur."""
        if not records:
            raise TesseraError("there are no predictions to compute metrics of")
        classes, names = len(data.classes), metric_names(data.classes[:NAMED_CLASSES])
        probabilities = torch.stack([r["probabilities"] for r in records]).double()
        truth = torch.tensor([r["label"] for r in records])
        predicted = torch.tensor([r["predicted"] for r in records])
        confidence = probabilities.gather(1, predicted[:, None])[:, 0]
        losses = torch.tensor([self.error_score(r) for r in records], dtype=torch.float64)
        best = probabilities.argsort(dim=1, descending=True, stable=True)[:, :5]
        roc_auc = RocAuc(probabilities, truth)
        correct = predicted == truth
        in_best = (best == truth[:, None]).any(1)

        def metrics(positions: Sequence[int]) -> dict[str, float]:
            chosen = torch.as_tensor(positions, dtype=torch.int64)
            matrix = _count(truth[chosen], predicted[chosen], classes)
            values = {
                "accuracy": int(matrix.diagonal().sum()) / len(chosen),
                "loss": math.fsum(losses[chosen].tolist()) / len(chosen),
                **_macro(matrix),
                **_corrected(matrix),
                "roc_auc": roc_auc(chosen),
                "calibration_error": _calibration_error(confidence[chosen], correct[chosen]),
            }
            if classes > 5:
                values["top5"] = int(in_best[chosen].sum()) / len(chosen)
            return values | _by_class(matrix, names)

        return metrics

    def confusion(self, records: Sequence[Record], data: DataSpec) -> Tensor:
        truth = torch.tensor([r["label"] for r in records], dtype=torch.int64)
        predicted = torch.tensor([r["predicted"] for r in records], dtype=torch.int64)
        return _count(truth, predicted, len(data.classes))

    def charts(self, records: Sequence[Record], data: DataSpec) -> list[Chart]:
        """Precision and recall of up to 10 classes; accuracy by confidence."""
        probabilities = torch.stack([r["probabilities"] for r in records]).double()
        truth = torch.tensor([r["label"] for r in records])
        names = metric_names(data.classes)
        lines = {
            names[k]: _precision_recall(probabilities[:, k], truth == k)
            for k in sorted(set(truth.tolist()))[:CHARTED_CLASSES]
        }
        confidence, predicted = probabilities.max(1)
        return [
            Chart("Precision and recall", "recall", "precision", lines),
            Chart(
                "Calibration",
                "mean confidence",
                "accuracy",
                {"": _reliability(confidence, predicted == truth)},
                diagonal=True,
            ),
        ]

    def error_score(self, record: Record) -> float:
        """Negative log-likelihood of the true class in nats, at most 87.4."""
        probability = float(record["probabilities"][record["label"]])
        return -math.log(max(probability, torch.finfo(torch.float32).tiny))

    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """`class`, its `probability`, and `top5`, the five most probable classes with theirs."""
        probabilities = prediction["probabilities"]
        best = probabilities.argsort(descending=True, stable=True)[:5].tolist()
        top5 = [{"class": data.classes[k], "probability": float(probabilities[k])} for k in best]
        return {**top5[0], "top5": top5}

    def panels(
        self,
        image: Tensor,
        prediction: Prediction | None,
        target: Target | None,
        data: DataSpec,
    ) -> list[Panel]:
        """The image, captioned with its class, the predicted one, or both if they differ."""
        truth = data.classes[target["label"]] if target else ""
        if prediction is None:
            return [Panel(image, truth)]
        label = prediction["label"]
        caption = f"{data.classes[label]} {float(prediction['probabilities'][label]):.0%}"
        wrong = target is not None and target["label"] != label
        return [Panel(image, f"{caption}, is {truth}" if wrong else caption)]


CLASSIFICATION = Classification()


def _count(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """(K, K) int64, rows are true classes, columns predicted ones, from two of (N,) int64."""
    pairs = truth * classes + predicted
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _by_class(matrix: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Recall of each class that occurs, precision of each that was predicted."""
    hits = matrix.diagonal().tolist()
    values = {}
    for kind, totals in (("recall", matrix.sum(1)), ("precision", matrix.sum(0))):
        for name, hit, total in zip(names, hits, totals.tolist()):
            if total:
                values[f"{kind}/{name}"] = hit / total
    return values


def _macro(matrix: Tensor) -> dict[str, float]:
    """Means over the classes that occur in truth or predictions. 0/0 is 0, as in scikit-learn."""
    hits = matrix.diagonal().tolist()
    truths, predictions = matrix.sum(1).tolist(), matrix.sum(0).tolist()
    rows = [row for row in zip(hits, truths, predictions) if row[1] or row[2]]
    return {
        "precision": math.fsum(hit / predicted for hit, _, predicted in rows if predicted)
        / len(rows),
        "recall": math.fsum(hit / truth for hit, truth, _ in rows if truth) / len(rows),
        "f1": math.fsum(2 * hit / (truth + predicted) for hit, truth, predicted in rows)
        / len(rows),
    }


def _corrected(matrix: Tensor) -> dict[str, float]:
    """Accuracies that the sizes of the classes don't raise. `kappa` is 0 if all images have one
    class, and it was predicted for all."""
    hits = matrix.diagonal().tolist()
    truths, predictions = matrix.sum(1).tolist(), matrix.sum(0).tolist()
    recalls = [hit / truth for hit, truth in zip(hits, truths) if truth]
    count = sum(truths)
    by_chance = sum(truth * predicted for truth, predicted in zip(truths, predictions))
    possible = count * count - by_chance
    return {
        "balanced_accuracy": math.fsum(recalls) / len(recalls),
        "kappa": (sum(hits) * count - by_chance) / possible if possible else 0.0,
    }


def _precision_recall(scores: Tensor, truth: Tensor) -> tuple[list[float], list[float]]:
    """Recalls and precisions with each score as threshold, from the highest."""
    scores, order = scores.sort(descending=True, stable=True)
    hits = truth[order].cumsum(0).double()
    accepted = torch.arange(1, len(scores) + 1)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    return (hits / hits[-1])[last].tolist(), (hits / accepted)[last].tolist()


def _reliability(confidence: Tensor, correct: Tensor) -> tuple[list[float], list[float]]:
    """Mean confidence and accuracy of each bin with an image."""
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS)
    members = [bins == number for number in sorted(set(bins.tolist()))]
    return (
        [float(confidence[one].mean()) for one in members],
        [float(correct[one].double().mean()) for one in members],
    )


def _calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Mean gap between confidence (N,) float64 and accuracy, from `correct` (N,) bool."""
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS)
    gaps: list[list[float]] = [[] for _ in range(CALIBRATION_BINS + 1)]
    for number, gap in zip(bins.tolist(), (confidence - correct.double()).tolist()):
        gaps[number].append(gap)
    return math.fsum(abs(math.fsum(gap)) for gap in gaps) / len(confidence)


class _Augment:
    """The transform: one gather for shift and mirror, then colours, normalisation, and blanks."""

    def __init__(self, settings: ClassificationAugment, data: DataSpec) -> None:
        self._settings = settings
        self._classes = len(data.classes)
        # (pixel / 255 - mean) / std as one multiplication and one addition
        std = torch.tensor(data.std, dtype=torch.float64)[:, None, None]
        mean = torch.tensor(data.mean, dtype=torch.float64)[:, None, None]
        self._scale = (1 / (255 * std)).float()
        self._offset = (-mean / std).float()

    def __call__(self, batch: Batch, rng: BatchRng) -> Batch:
        images: Tensor = batch["image"]
        self._scale = self._scale.to(images.device)
        self._offset = self._offset.to(images.device)
        if self._settings.flip or self._settings.crop_padding:
            images = self._shift(images, rng)
        images = images.float()
        if self._settings.changes_colours:
            images = change_colours(images / 255, self._settings, rng) * 255
        images = torch.addcmul(self._offset, images, self._scale)
        if self._settings.cutout:
            images = self._cut(images, rng)
        if self._settings.erasing:
            images = erase(images, self._settings.erasing, rng)
        batch = {**batch, "image": images}
        smoothing = self._settings.label_smoothing
        if smoothing:
            target = F.one_hot(batch["label"], self._classes).float()
            batch["target"] = target * (1 - smoothing) + smoothing / self._classes
        return batch

    def _shift(self, images: Tensor, rng: BatchRng) -> Tensor:
        """Shifts and mirrors each image at random."""
        count, channels, height, width = images.shape
        padding = self._settings.crop_padding
        offset = rng.integers(2 * padding + 1, 2) - padding
        rows = _reflect(torch.arange(height) + offset[:, :1], height)
        columns = torch.arange(width).expand(count, -1)
        if self._settings.flip:
            mirrored = rng.uniform(1) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        columns = _reflect(columns + offset[:, 1:], width)
        rows = rows.to(images.device, non_blocking=True)
        columns = columns.to(images.device, non_blocking=True)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
        pixels = pixels[:, None].expand(-1, channels, -1)
        return images.flatten(2).gather(2, pixels).view_as(images)

    def _cut(self, images: Tensor, rng: BatchRng) -> Tensor:
        """Blanks a random square of each image; part of it can lie outside."""
        height, width = images.shape[-2:]
        side = self._settings.cutout
        corner = rng.uniform(2) * torch.tensor([height, width]) - side / 2
        top, left = corner.round().to(images.device, non_blocking=True)[:, :, None].unbind(1)
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        cut_rows = (rows >= top) & (rows < top + side)
        cut_columns = (columns >= left) & (columns < left + side)
        cut = cut_rows[:, None, :, None] & cut_columns[:, None, None, :]
        return images.masked_fill(cut, 0.0)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices beyond an edge, reflected back into the image."""
    return (size - 1) - ((size - 1) - index.abs()).abs()
