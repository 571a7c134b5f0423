"""Reconstruction: an image is compressed to a short code and restored from it.

In: uint8 images of any data set. Out: the images as the network sees them, corrupted if the recipe
says so, with the targets; the metrics; codes as JSON, reconstructions as images. Must not know any
network.

    B images, N images of a whole split, C channels, H height, W width, D numbers of a code

A transformed batch has `image` (B, C, H, W), the normalised input; `clean` (B, C, H, W) in 0..1,
the target; and `seen` uint8 (B, C, H, W), the input as an image, if it is corrupted. A prediction
has `image` (C, H, W) float32 in 0..1, not rounded to the 256 levels of a file, because that would
add 1/12/255² to its error; `code` (D,) float32 and its size in `bits`; `mse` if the target is
known; and `seen` as above. A target has `image` uint8 (C, H, W).
"""

from __future__ import annotations

import dataclasses
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
from models.metrics import image_quality

SQUARES = 7
"""Squares that `augment.mask` can blank, along the shorter side of an image."""


@dataclass(frozen=True)
class ReconstructionAugment:
    flip: bool = False
    """Mirror half of the training images, left to right."""
    crop_padding: int = 0
    """Shift training images by up to so many pixels each way. The border is filled by
    reflection."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on pixels in 0..1, which the network has to remove.
    Added in training and in evaluations, not to a user's images."""
    mask: float = 0.0
    """Share of the image that is blanked in random squares, which the network has to fill in. In
    training and in evaluations, not in a user's images."""

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise UsageError(
                f"augment.crop_padding = {self.crop_padding}", hint="give 0 or more pixels"
            )
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"augment.noise = {self.noise}", hint="give 0 or more, like 0.3")
        if not 0 <= self.mask < 1:
            raise UsageError(f"augment.mask = {self.mask}", hint="give 0 or more, below 1")


class Reconstruction(Task):
    name = "reconstruction"
    reads = "images"
    output_name = "image"
    primary = Metric("mse", "min")
    extra_metrics = ("psnr",)
    augment_settings = ReconstructionAugment
    knows_classes = False

    def targets(self, batch: Batch) -> list[Target]:
        images = batch["image"]
        if "clean" in batch:
            images = as_bytes(batch["clean"])
        images = images.cpu()
        return [
            {"image": image[:, :height, :width].clone()}
            for image, (height, width) in zip(images, batch["extent"].tolist())
        ]

    def augment(self, settings: ReconstructionAugment, data: DataSpec, *, train: bool) -> Transform:
        if settings.crop_padding >= min(data.height, data.width):
            raise UsageError(
                f"augment.crop_padding = {settings.crop_padding} for images of "
                f"{data.height} by {data.width} pixels",
                hint=f"give at most {min(data.height, data.width) - 1}",
            )
        still = dataclasses.replace(settings, flip=False, crop_padding=0)
        return _Augment(settings if train else still, data)

    def prepare(self, settings: ReconstructionAugment, data: DataSpec) -> Transform:
        """Doesn't corrupt a user's image."""
        return _Augment(ReconstructionAugment(), data)

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """`mse`, `psnr` and `ssim` on pixels in 0..1; the size of the code in `bits`; the number of
        `pixels` and of `values` (pixels times channels) of the image."""
        image, truth = prediction["image"], target["image"].double() / 255
        error = image_quality.mse(image, truth)
        return {
            "mse": error,
            "psnr": image_quality.decibels(error, peak=1),
            "ssim": image_quality.ssim(image, truth, peak=1),
            "bits": prediction["bits"],
            "pixels": truth.shape[-2] * truth.shape[-1],
            "values": truth.numel(),
        }

    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """Means over the images of `mse` on pixels in 0..1, `psnr` in dB, and `ssim`;
        `bits_per_pixel` of the codes; `compression`, the size of the images at 8 bits a channel
        relative to the codes. Sums are exact, so the order of the images changes no digit."""
        if not records:
            raise TesseraError("there are no predictions to compute metrics of")
        metrics = {
            name: math.fsum(record[name] for record in records) / len(records)
            for name in ("mse", "psnr", "ssim")
        }
        bits, pixels, values = (
            sum(record[name] for record in records) for name in ("bits", "pixels", "values")
        )
        return {**metrics, "bits_per_pixel": bits / pixels, "compression": 8 * values / bits}

    def error_score(self, record: Record) -> float:
        """The mean squared error."""
        return float(record["mse"])

    def to_original_size(self, prediction: Prediction, view: View) -> Prediction:
        """The reconstruction, scaled back to the size of the image. If the network saw only the
        centre of the image, it is black around that."""
        image, size = prediction["image"], view.size
        if tuple(image.shape[-2:]) == size:
            return prediction
        if view.scale != (1.0, 1.0):
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        else:
            for axis, length, shift in zip((-2, -1), size, view.shift):
                image = _uncrop(image, axis, length, shift)
        return {**prediction, "image": image.clamp(0, 1)}

    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """`mse` and `psnr` of the reconstruction at the network's input size, on pixels in 0..1, if
        the image is known; and the `code`, a list of D numbers, with its size in `bits`."""
        code = {"code": prediction["code"].tolist(), "bits": prediction["bits"]}
        if "mse" not in prediction:
            return code
        error = prediction["mse"]
        return {"mse": error, "psnr": image_quality.decibels(error, peak=1), **code}

    def panels(
        self,
        image: Tensor,
        prediction: Prediction | None,
        target: Target | None,
        data: DataSpec,
    ) -> list[Panel]:
        """The image, the corrupted input if it was corrupted, and the reconstruction."""
        if prediction is None:
            return [Panel(image, "original")]
        reconstruction = as_bytes(prediction["image"])
        if "mse" not in prediction:  # from a code alone
            return [Panel(reconstruction, "from a code")]
        seen = [Panel(prediction["seen"], "input")] if "seen" in prediction else []
        decibels = image_quality.decibels(prediction["mse"], peak=1)
        return [Panel(image, "original"), *seen, Panel(reconstruction, f"{decibels:.1f} dB")]

    def sample_panels(self, batch: Batch, data: DataSpec) -> list[list[Panel]]:
        """The targets, each with the input beside it if that is corrupted."""
        groups = [self.panels(t["image"], None, t, data) for t in self.targets(batch)]
        if "seen" in batch:
            for group, seen in zip(groups, batch["seen"].cpu()):
                height, width = group[0].image.shape[-2:]
                group.append(Panel(seen[:, :height, :width], "input"))
        return groups

    def prediction_to_image(self, prediction: Prediction) -> Tensor:
        return as_bytes(prediction["image"])


RECONSTRUCTION = Reconstruction()


def as_bytes(pixels: Tensor) -> Tensor:
    """float in 0..1 -> uint8, rounded."""
    return (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def inside(extent: Tensor, height: int, width: int) -> Tensor:
    """The pixels that are not padding: `extent` (B, 2) -> bool (B, 1, height, width)."""
    rows = torch.arange(height, device=extent.device)[:, None] < extent[:, :1, None]
    columns = torch.arange(width, device=extent.device) < extent[:, 1:, None]
    return (rows & columns)[:, None]


def _uncrop(image: Tensor, axis: int, length: int, shift: int) -> Tensor:
    """Undoes along an axis a crop to the centre (`shift` 0 or less) or a padding (`shift` above
    0)."""
    current = image.shape[axis]
    if current > length:
        return image.narrow(axis, shift, length)
    shape = list(image.shape)
    shape[axis] = length
    large = image.new_zeros(shape)
    large.narrow(axis, -shift, current).copy_(image)
    return large


class _Augment:
    """The transform: one gather for shift and mirror, then noise and mask, then normalisation."""

    def __init__(self, settings: ReconstructionAugment, data: DataSpec) -> None:
        self._settings = settings
        self._mean = torch.tensor(data.mean)[:, None, None]
        self._std = torch.tensor(data.std)[:, None, None]

    def __call__(self, batch: Batch, rng: BatchRng) -> Batch:
        images: Tensor = batch["image"]
        settings, device = self._settings, images.device
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        if settings.flip or settings.crop_padding:
            images = self._shift(images, batch["extent"], rng)
        clean = images.float() / 255
        batch = {**batch, "clean": clean}
        seen = clean
        if settings.noise:
            noise = rng.normal(*clean.shape[1:]).to(device, non_blocking=True)
            seen = (seen + settings.noise * noise).clamp(0, 1)
        if settings.mask:
            blank = _squares(settings.mask, clean.shape[-2], clean.shape[-1], rng)
            seen = torch.where(blank.to(device, non_blocking=True), self._mean, seen)
        if settings.noise or settings.mask:
            batch["seen"] = as_bytes(seen)
        batch["image"] = (seen - self._mean) / self._std
        return batch

    def _shift(self, images: Tensor, extent: Tensor, rng: BatchRng) -> Tensor:
        """Shifts and mirrors each image at random, inside its extent."""
        count, channels, height, width = images.shape
        padding = self._settings.crop_padding
        offset = rng.integers(2 * padding + 1, 2) - padding
        mirrored = torch.zeros(count, 1, dtype=torch.bool)
        if self._settings.flip:
            mirrored = rng.uniform(1) < 0.5
        extent = extent.cpu()
        rows = _moved(height, extent[:, :1], offset[:, :1], torch.zeros_like(mirrored))
        columns = _moved(width, extent[:, 1:], offset[:, 1:], mirrored)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
        pixels = pixels.to(images.device, non_blocking=True)
        pixels = pixels[:, None].expand(-1, channels, -1)
        return images.flatten(2).gather(2, pixels).view_as(images)


def _moved(size: int, length: Tensor, offset: Tensor, mirrored: Tensor) -> Tensor:
    """For each of `size` positions of an axis the index of its source pixel, (B, size). The first
    `length` (B, 1) are moved, with reflection at the edges; the padding after them stays."""
    positions = torch.arange(size).expand(len(length), -1)
    last = length - 1
    source = torch.where(mirrored, last - positions, positions) + offset
    source = (last - (last - source.abs()).abs()).minimum(last).clamp(min=0)
    return torch.where(positions <= last, source, positions)


def _squares(share: float, height: int, width: int, rng: BatchRng) -> Tensor:
    """Bool (B, 1, height, width): random squares of a grid for each image, in total about `share`
    of the grid and at least one."""
    side = max(1, round(min(height, width) / SQUARES))
    down, across = math.ceil(height / side), math.ceil(width / side)
    count = max(1, round(share * down * across))
    order = rng.uniform(down * across).argsort(dim=1, stable=True)
    blank = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :count], True)
    blank = blank.view(-1, 1, down, across)
    blank = blank.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return blank[..., :height, :width]
