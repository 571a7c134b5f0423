"""Reconstruction: an image goes through a short code and comes back.

In: uint8 images, of any data set. Out: the images as the network sees them, corrupted where the
recipe says so, beside what they should become; the figures; codes as JSON, reconstructions as
pictures. Must not know any network.

    B images, N images of a whole split, C channels, H height, W width, D numbers of a code

A transformed batch has `image` (B, C, H, W) normalised, what the network sees; `clean` (B, C, H, W)
in 0..1, what it should answer; and `seen` uint8 (B, C, H, W), `image` as a picture, where it is
corrupted. A prediction has `image` (C, H, W) float32 in 0..1, not rounded to the 256 levels of a file,
because that would add 1/12/255² to its error; `code` (D,) float32 and `bits`, how many bits the code
is; `mse` where it is known what it should be, and `seen` as above. A target has `image` uint8
(C, H, W).
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
"""`augment.mask` blanks squares, of which so many go along the shorter side of an image."""


@dataclass(frozen=True)
class ReconstructionAugment:
    """What is done to training images. `flip`: mirror every second image, left to right.
    `crop_padding`: shift by up to so many pixels each way, the edge mirrored.

    What the network has to undo, in training and in every evaluation, but not on a user's image:
    `noise`: standard deviation of Gaussian noise on pixels in 0..1. `mask`: share of the image that
    is blanked, in random squares."""

    flip: bool = False
    crop_padding: int = 0
    noise: float = 0.0
    mask: float = 0.0

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
        """A user's image is what it is: nothing is added to it or blanked."""
        return _Augment(ReconstructionAugment(), data)

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """`mse`, `psnr`, `ssim` on pixels in 0..1; `bits` of the code; `pixels` and `values`
        (pixels times channels) of the image."""
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
        """Means over the images of `mse`, on pixels in 0..1, `psnr` in dB, and `ssim`;
        `bits_per_pixel` of the codes; `compression`, how many times as large the images are at 8
        bits a channel. Sums are exact, so the order of the images moves no digit."""
        if not records:
            raise TesseraError("there is no answer to make figures of")
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
        """The reconstruction in the image's own size: scaled back; where the frame showed only the
        middle of the image, black around it."""
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
        """`mse` and `psnr` of the reconstruction at the size that the network sees, on pixels in
        0..1, where the image is known; and the `code`, a list of D numbers."""
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
        """The image, what the network saw of it where that was corrupted, what it made of it."""
        if prediction is None:
            return [Panel(image, "original")]
        made = as_bytes(prediction["image"])
        if "mse" not in prediction:  # from a code alone
            return [Panel(made, "from a code")]
        seen = [Panel(prediction["seen"], "what is seen")] if "seen" in prediction else []
        decibels = image_quality.decibels(prediction["mse"], peak=1)
        return [Panel(image, "original"), *seen, Panel(made, f"{decibels:.1f} dB")]

    def sample_panels(self, batch: Batch, data: DataSpec) -> list[list[Panel]]:
        """What the network has to answer, and beside it what it sees where that is corrupted."""
        groups = [self.panels(t["image"], None, t, data) for t in self.targets(batch)]
        if "seen" in batch:
            for group, seen in zip(groups, batch["seen"].cpu()):
                height, width = group[0].image.shape[-2:]
                group.append(Panel(seen[:, :height, :width], "what is seen"))
        return groups

    def prediction_to_image(self, prediction: Prediction) -> Tensor:
        return as_bytes(prediction["image"])


RECONSTRUCTION = Reconstruction()


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels in 0..1 as uint8, rounded."""
    return (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def inside(extent: Tensor, height: int, width: int) -> Tensor:
    """Which pixels of a frame are picture: (B, 2) of `extent` -> bool (B, 1, height, width)."""
    rows = torch.arange(height, device=extent.device)[:, None] < extent[:, :1, None]
    columns = torch.arange(width, device=extent.device) < extent[:, 1:, None]
    return (rows & columns)[:, None]


def _uncrop(image: Tensor, axis: int, length: int, shift: int) -> Tensor:
    """Undoes along an axis that the middle was cut out (`shift` 0 or less), or that the edge was
    continued (`shift` above 0)."""
    given = image.shape[axis]
    if given > length:
        return image.narrow(axis, shift, length)
    shape = list(image.shape)
    shape[axis] = length
    whole = image.new_zeros(shape)
    whole.narrow(axis, -shift, given).copy_(image)
    return whole


class _Augment:
    """The transform: one gather for shift and mirror, then what is to be undone, then the
    normalisation."""

    def __init__(self, settings: ReconstructionAugment, data: DataSpec) -> None:
        self._settings = settings
        self._mean = torch.tensor(data.mean)[:, None, None]
        self._std = torch.tensor(data.std)[:, None, None]

    def __call__(self, batch: Batch, draws: BatchRng) -> Batch:
        images: Tensor = batch["image"]
        settings, device = self._settings, images.device
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        if settings.flip or settings.crop_padding:
            images = self._shift(images, batch["extent"], draws)
        clean = images.float() / 255
        batch = {**batch, "clean": clean}
        seen = clean
        if settings.noise:
            noise = draws.normal(*clean.shape[1:]).to(device, non_blocking=True)
            seen = (seen + settings.noise * noise).clamp(0, 1)
        if settings.mask:
            blank = _squares(settings.mask, clean.shape[-2], clean.shape[-1], draws)
            seen = torch.where(blank.to(device, non_blocking=True), self._mean, seen)
        if settings.noise or settings.mask:
            batch["seen"] = as_bytes(seen)
        batch["image"] = (seen - self._mean) / self._std
        return batch

    def _shift(self, images: Tensor, extent: Tensor, draws: BatchRng) -> Tensor:
        """Shifts and mirrors each image by its own draw, inside its extent."""
        count, channels, height, width = images.shape
        padding = self._settings.crop_padding
        offset = draws.integers(2 * padding + 1, 2) - padding
        mirrored = torch.zeros(count, 1, dtype=torch.bool)
        if self._settings.flip:
            mirrored = draws.uniform(1) < 0.5
        extent = extent.cpu()
        rows = _moved(height, extent[:, :1], offset[:, :1], torch.zeros_like(mirrored))
        columns = _moved(width, extent[:, 1:], offset[:, 1:], mirrored)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
        pixels = pixels.to(images.device, non_blocking=True)
        pixels = pixels[:, None].expand(-1, channels, -1)
        return images.flatten(2).gather(2, pixels).view_as(images)


def _moved(size: int, length: Tensor, offset: Tensor, mirrored: Tensor) -> Tensor:
    """For each of `size` places of an axis the place whose pixel comes there, (B, size). The first
    `length` (B, 1) are picture and are moved, mirrored back at its edges."""
    places = torch.arange(size).expand(len(length), -1)
    last = length - 1
    to = torch.where(mirrored, last - places, places) + offset
    to = (last - (last - to.abs()).abs()).minimum(last).clamp(min=0)
    return torch.where(places <= last, to, places)


def _squares(share: float, height: int, width: int, draws: BatchRng) -> Tensor:
    """Bool (B, 1, height, width): squares of a grid, drawn for each image, so many that they are
    `share` of the grid, and at least one."""
    side = max(1, round(min(height, width) / SQUARES))
    down, across = math.ceil(height / side), math.ceil(width / side)
    count = max(1, round(share * down * across))
    order = draws.uniform(down * across).argsort(dim=1, stable=True)
    blank = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :count], True)
    blank = blank.view(-1, 1, down, across)
    blank = blank.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return blank[..., :height, :width]
