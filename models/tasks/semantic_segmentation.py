"""Semantic segmentation: a class for each pixel.

In: uint8 images with the class of each pixel; later the predicted classes. Out: the images as the
network sees them, the metrics, and predictions as JSON. Must not know any network.

    B images, C channels, H height, W width, K classes
    P patches of one image, h height and w width of the network's input

A batch has `mask` uint8 (B, H, W), 255 where a pixel has no class. A training batch with several
patches of each image has `image` (B, P, C, h, w) and `mask` (B, P, h, w). A prediction has `mask`
uint8 (H, W), for the image without padding, and `confidence`, the mean probability of the predicted
classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.core.errors import TesseraError, UsageError
from models.core.family import (
    Batch,
    BatchRng,
    DataSpec,
    Metric,
    Panel,
    Prediction,
    Record,
    Target,
    Task,
    Transform,
    View,
)
from models.metrics.average_precision import NAMED_CLASSES, metric_names

IGNORED = 255
"""The value of pixels without a class."""
SHOWN_PATCHES = 4
"""Patches of one image that are drawn."""


@dataclass(frozen=True)
class SegmentationAugment:
    patch: int = 0
    """Side in pixels of the random squares that are cut out for training; 0 takes the whole image.
    Beyond the edge the image is reflected, and its pixels have no class."""
    patches: int = 1
    """Patches of each image in one step."""
    flip: bool = False
    """Mirror half of the patches, left to right."""
    flip_vertical: bool = False
    """Mirror half of the patches, top to bottom."""
    rotate: bool = False
    """Rotate by a random multiple of 90 degrees."""
    zoom: float = 0.0
    """Enlarge or reduce by up to this share."""
    elastic: float = 0.0
    """Standard deviation in pixels of random shifts on a 3x3 grid, between which the image is
    deformed smoothly (Ronneberger et al., U-Net, 2015, use 10)."""
    brightness: float = 0.0
    """Brighten or darken by up to this share of the pixels' range."""
    contrast: float = 0.0
    """Change the contrast by up to this share."""

    def __post_init__(self) -> None:
        if self.patch < 0 or self.elastic < 0:
            raise UsageError(
                f"augment.patch = {self.patch}, augment.elastic = {self.elastic}",
                hint="give 0 or more pixels",
            )
        if self.patches < 1:
            raise UsageError(f"augment.patches = {self.patches}", hint="give 1 or more")
        for name in ("zoom", "brightness", "contrast"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(
                    f"augment.{name} = {getattr(self, name)}", hint="give 0 or more, below 1"
                )


class SemanticSegmentation(Task):
    name = "semantic_segmentation"
    reads = "semantic_segmentation"
    output_name = "probabilities"
    primary = Metric("miou", "max")
    extra_metrics = ("pixel_accuracy",)
    augment_settings = SegmentationAugment
    eval_batch = 4

    def targets(self, batch: Batch) -> list[Target]:
        masks = batch["mask"].cpu()
        extents = batch["extent"].tolist()
        return [{"mask": m[:height, :width]} for m, (height, width) in zip(masks, extents)]

    def augment(self, settings: SegmentationAugment, data: DataSpec, *, train: bool) -> Transform:
        return _Augment(settings if train else None, data)

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """`counts` (K, K) int64 of the pixels with a class: rows are true classes, columns
        predicted ones."""
        classes = len(data.classes)
        predicted, truth = prediction["mask"], target["mask"]
        if predicted.shape != truth.shape:
            raise TesseraError(
                f"a prediction has {tuple(predicted.shape)} pixels, its target {tuple(truth.shape)}"
            )
        known = truth != IGNORED
        predicted, truth = predicted[known].long(), truth[known].long()
        for name, mask in (("target", truth), ("prediction", predicted)):
            if mask.numel() and int(mask.max()) >= classes:
                raise TesseraError(
                    f"a {name} has the class {int(mask.max())}, but there are {classes} classes"
                )
        counts = torch.bincount(truth * classes + predicted, minlength=classes**2)
        return {"counts": counts.reshape(classes, classes)}

    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """`miou`, the mean over classes of intersection over union, `dice`, the mean over classes
        of 2 * intersection / (truth + prediction), and `pixel_accuracy`, each over the pixels of
        all images together; and `iou/CLASS`.

        Pixels without a class don't count, nor do classes in no truth and no prediction. Counts are
        integers, so the order of the images changes no digit.
        """
        matrix = self.confusion(records, data)
        total = int(matrix.sum())
        if not total:
            raise TesseraError(
                "no pixel of these images has a class, so there is nothing to compute metrics of"
            )
        names = metric_names(data.classes)
        ious = _ious(matrix)
        dices = [2 * iou / (1 + iou) for iou in ious.values()]
        return {
            "miou": math.fsum(ious.values()) / len(ious),
            "dice": math.fsum(dices) / len(dices),
            "pixel_accuracy": int(matrix.diagonal().sum()) / total,
            **{f"iou/{names[k]}": iou for k, iou in ious.items() if k < NAMED_CLASSES},
        }

    def confusion(self, records: Sequence[Record], data: DataSpec) -> Tensor:
        classes = len(data.classes)
        matrix = torch.zeros(classes, classes, dtype=torch.int64)
        for record in records:
            matrix += record["counts"]
        return matrix

    def error_score(self, record: Record) -> float:
        """1 - the mean IoU of the classes in the image; 0 if no pixel has a class."""
        ious = _ious(record["counts"])
        return 1 - math.fsum(ious.values()) / len(ious) if ious else 0.0

    def to_original_size(self, prediction: Prediction, view: View) -> Prediction:
        """The mask at the size of the image. Pixels that the network didn't see have no class."""
        mask = prediction["mask"]
        axes = zip(view.size, view.scale, view.shift, mask.shape)
        rows, columns = (_seen(*axis) for axis in axes)
        restored = mask[rows.clamp(min=0)][:, columns.clamp(min=0)]
        unseen = (rows < 0)[:, None] | (columns < 0)
        return {**prediction, "mask": restored.masked_fill(unseen, IGNORED)}

    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """`shares`, the share of the pixels in each class, and `confidence`."""
        counts = torch.bincount(prediction["mask"].flatten().long(), minlength=IGNORED + 1)
        known = counts[: len(data.classes)].tolist()
        total = sum(known) or 1
        shares = {name: count / total for name, count in zip(data.classes, known)}
        return {"shares": shares, "confidence": prediction["confidence"]}

    def panels(
        self,
        image: Tensor,
        prediction: Prediction | None,
        target: Target | None,
        data: DataSpec,
    ) -> list[Panel]:
        """The image with the truth, if it is known, and the image with the prediction."""
        panels = []
        if target is not None:
            panels.append(Panel(image, "truth", mask=target["mask"]))
        if prediction is not None:
            caption = f"confidence {prediction['confidence']:.0%}"
            if target is not None:
                wrong = self.error_score(self.make_record(prediction, target, data))
                caption = f"mean IoU {1 - wrong:.2f}"
            panels.append(Panel(image, caption, mask=prediction["mask"]))
        return panels

    def sample_panels(self, batch: Batch, data: DataSpec) -> list[list[Panel]]:
        """The first patches of each image, with their truths."""
        images, masks = batch["image"], batch["mask"]
        if images.ndim == 4:
            return super().sample_panels(batch, data)
        groups: list[list[Panel]] = [[] for _ in images]
        for patch in range(min(images.shape[1], SHOWN_PATCHES)):
            part = {**batch, "image": images[:, patch], "mask": masks[:, patch]}
            for group, panels in zip(groups, super().sample_panels(part, data)):
                group += panels
        return groups

    def prediction_to_image(self, prediction: Prediction) -> Tensor:
        """(H, W): the index of each pixel's class, 255 for none."""
        mask: Tensor = prediction["mask"]
        return mask


SEMANTIC_SEGMENTATION = SemanticSegmentation()


def _ious(matrix: Tensor) -> dict[int, float]:
    """Intersection over union of each class in truth or predictions."""
    hits = matrix.diagonal().tolist()
    truths, predictions = matrix.sum(1).tolist(), matrix.sum(0).tolist()
    return {
        k: hit / (truth + predicted - hit)
        for k, (hit, truth, predicted) in enumerate(zip(hits, truths, predictions))
        if truth or predicted
    }


def _seen(size: int, scale: float, shift: int, predicted: int) -> Tensor:
    """For each of an image's `size` pixels along an axis, its index among the `predicted` ones; -1
    if the network didn't see it."""
    index = ((torch.arange(size, dtype=torch.float64) + 0.5) * scale + shift).floor().long()
    return torch.where(index < predicted, index, -1).clamp(min=-1)


class _Augment:
    """The transform: cuts patches, normalises them, and changes brightness and contrast. Without
    settings, it only normalises."""

    def __init__(self, settings: SegmentationAugment | None, data: DataSpec) -> None:
        self._settings = settings
        std = torch.tensor(data.std, dtype=torch.float64)[:, None, None]
        mean = torch.tensor(data.mean, dtype=torch.float64)[:, None, None]
        self._scale, self._offset = (1 / (255 * std)).float(), (-mean / std).float()
        self._std = std.float()

    def __call__(self, batch: Batch, rng: BatchRng) -> Batch:
        image: Tensor = batch["image"]
        self._scale, self._offset, self._std = (
            constant.to(image.device) for constant in (self._scale, self._offset, self._std)
        )
        settings = self._settings
        if settings is None:
            return {**batch, "image": self._normalise(image)}
        image, mask = self._patches(batch, settings, rng)  # (B, C, P, h, w), (B, P, h, w)
        image = self._normalise(image.transpose(1, 2))
        if settings.brightness or settings.contrast:
            image = self._recolour(image, settings, rng)
        if settings.patches == 1:
            image, mask = image[:, 0], mask[:, 0]
        frame = torch.tensor(mask.shape[-2:]).expand(len(mask), 2).to(batch["extent"].device)
        return {**batch, "image": image, "mask": mask, "extent": frame}

    def _normalise(self, image: Tensor) -> Tensor:
        return torch.addcmul(self._offset, image.float(), self._scale)

    def _patches(
        self, batch: Batch, settings: SegmentationAugment, rng: BatchRng
    ) -> tuple[Tensor, Tensor]:
        image, mask = batch["image"], batch["mask"]
        high, wide = image.shape[-2:]
        frame = (settings.patch or high, settings.patch or wide)
        positions = _positions(settings, frame, batch["extent"].cpu(), rng).to(image.device)
        edges = batch["extent"].to(image.device)[:, None, None, None, :]
        inside = ((positions > -0.5) & (positions < edges - 0.5)).all(-1)
        # Beyond an edge the image is reflected, repeatedly if needed.
        at = (edges - ((positions + 0.5).remainder(2 * edges) - edges).abs() - 0.5).clamp(min=0)
        at = at.minimum(edges - 1)
        nearest = at.round().long()
        pixels = (nearest[..., 0] * wide + nearest[..., 1]).flatten(1)
        classes = mask.flatten(1).gather(1, pixels).view_as(inside)
        classes = classes.masked_fill(~inside, IGNORED)
        if settings.zoom or settings.elastic:
            # -1..1 from the first pixel's centre to the last one's, the column first
            grid = 2 * at / torch.tensor([max(high - 1, 1), max(wide - 1, 1)]).to(at) - 1
            grid = grid.flip(-1).flatten(1, 2)
            seen = F.grid_sample(image.float(), grid, padding_mode="border", align_corners=True)
        else:
            pixels = pixels[:, None].expand(-1, image.shape[1], -1)
            seen = image.flatten(2).gather(2, pixels)
        return seen.view(*image.shape[:2], *inside.shape[1:]), classes

    def _recolour(self, image: Tensor, settings: SegmentationAugment, rng: BatchRng) -> Tensor:
        change = (2 * rng.uniform(settings.patches, 2) - 1).to(image.device)
        brighter, stronger = change[:, :, :, None, None, None].unbind(2)
        shift = settings.brightness * brighter / self._std
        return image * (1 + settings.contrast * stronger) + shift


def _positions(
    settings: SegmentationAugment, frame: tuple[int, int], extent: Tensor, rng: BatchRng
) -> Tensor:
    """Source positions of the patches' pixels, (B, P, h, w, 2): row and column in the image,
    integers at the centres of pixels."""
    patches = settings.patches
    turns = rng.integers(4, patches) if settings.rotate else torch.zeros(len(extent), patches)
    mirrored = (rng.uniform(patches, 2) < 0.5) & torch.tensor(
        [settings.flip_vertical, settings.flip]
    )
    zoom = torch.exp((2 * rng.uniform(patches, 1) - 1) * math.log1p(settings.zoom))
    turned = (turns % 2 == 1)[:, :, None]
    sides = torch.tensor(frame, dtype=torch.float32)
    covered = torch.where(turned, sides.flip(0), sides) / zoom
    room = extent[:, None] - covered
    corner = torch.where(room < 0, room / 2, rng.uniform(patches, 2) * (room.floor() + 1)).floor()

    rows, columns = (torch.arange(side) + 0.5 - side / 2 for side in frame)
    offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    offsets = offsets * (1 - 2 * mirrored.float())[:, :, None, None, :]
    quarter = offsets.flip(-1) * torch.tensor([1.0, -1.0])
    offsets = torch.where(turned[..., None, None], quarter, offsets)
    around = 1 - 2 * (turns >= 2).float()
    offsets = offsets * (around[..., None] / zoom)[:, :, None, None, :]
    positions = offsets + (corner + covered / 2 - 0.5)[:, :, None, None, :]
    if settings.elastic:
        shifts = rng.normal(patches, 2, 3, 3).flatten(0, 1) * settings.elastic
        smooth = F.interpolate(shifts, size=frame, mode="bicubic", align_corners=True)
        positions = positions + smooth.view(-1, patches, 2, *frame).movedim(2, -1)
    return positions
