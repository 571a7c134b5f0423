"""Upscaling: enlarging an image.

In: uint8 images. Each is reduced, and the network enlarges it again. Out: images as the network
sees them, with their targets; how close an enlarged image comes, compared with bicubic
interpolation. Must not know any network.

    B images, P patches of each, C channels, H height, W width, S scale; h = H / S, w = W / S

The small image is the large one reduced by antialiased bicubic interpolation and rounded, as a
stored image would be; papers call this "BI". In training, a transformed batch has `image` (B, P, C,
h, w), normalised, and `high` (B, P, C, H, W) in 0..1. In an evaluation it has whole images: `image`
(B, C, h, w), `high` (B, C, H, W), and `extent` (B, 2), the size in `image` without padding. A
user's image is not reduced and has no `high`. A target has `image` uint8 (C, H, W). A prediction
has `image` uint8 (C, h*S, w*S) and `low` uint8 (C, h, w), its input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
)
from models.metrics import image_quality

SCALES = (2, 3, 4)
SHOWN_PIXELS = 96
"""Side of the crop that is drawn, in pixels of the large image."""


@dataclass(frozen=True)
class UpscalingAugment:
    scale: int = 2
    """How many times the images are reduced: 2, 3 or 4. The same as `model.scale`."""
    patch: int = 72
    """Side of the random training squares, in pixels of the large image; a multiple of `scale`."""
    patches: int = 4
    """Training squares of each image in one step."""
    flip: bool = True
    """Mirror half of the squares left to right, and half of them top to bottom."""
    turn: bool = True
    """Rotate half of the squares by 90 degrees."""

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise UsageError(f"augment.scale = {self.scale}", hint="give 2, 3 or 4")
        if self.patch < self.scale or self.patch % self.scale:
            raise UsageError(
                f"augment.patch = {self.patch} with augment.scale = {self.scale}",
                hint="give a multiple of the scale; 72 and 96 work for 2, 3 and 4",
            )
        if self.patches < 1:
            raise UsageError(f"augment.patches = {self.patches}", hint="give 1 or more")


class Upscaling(Task):
    name = "upscaling"
    reads = "images"
    primary = Metric("psnr", "max")
    extra_metrics = ("psnr_gain",)
    augment_settings = UpscalingAugment
    eval_batch = 4
    knows_classes = False

    def targets(self, batch: Batch) -> list[Target]:
        """The whole images; for a training batch, the first patch of each image."""
        if "high" not in batch:
            return [
                {"image": image[:, :height, :width].cpu()}
                for image, (height, width) in zip(batch["image"], batch["extent"].tolist())
            ]
        high = to_pixels(batch["high"].detach()).cpu()
        if high.ndim == 5:
            return [{"image": patches[0]} for patches in high]
        scale = high.shape[-2] // batch["image"].shape[-2]
        return [
            {"image": image[:, : height * scale, : width * scale]}
            for image, (height, width) in zip(high, batch["extent"].tolist())
        ]

    def augment(self, settings: UpscalingAugment, data: DataSpec, *, train: bool) -> Transform:
        return _Patches(settings, data) if train else _Whole(settings, data)

    def prepare(self, settings: UpscalingAugment, data: DataSpec) -> Transform:
        return _Normalise(data)

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """`psnr` and `ssim` of the prediction, and `psnr_bicubic` of bicubic interpolation. All on
        luma without a border of S pixels, as in the papers."""
        image, low = prediction["image"], prediction["low"]
        scale = scale_of(prediction)
        truth = crop_to_multiple(target["image"], scale)
        if truth.shape != image.shape:
            raise TesseraError(
                f"the prediction has the shape {tuple(image.shape)}, "
                f"its target {tuple(truth.shape)}"
            )
        true, ours, plain = (_measured(i, scale) for i in (truth, image, enlarge(low, scale)))
        return {
            "psnr": image_quality.psnr(ours, true, peak=255),
            "ssim": image_quality.ssim(ours, true, peak=255),
            "psnr_bicubic": image_quality.psnr(plain, true, peak=255),
        }

    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """Means over the images: `psnr` in dB, `ssim`, `psnr_bicubic`, and `psnr_gain`, the
        difference in dB to bicubic interpolation."""
        if not records:
            raise TesseraError("there are no predictions to compute metrics of")
        means = {
            name: math.fsum(record[name] for record in records) / len(records)
            for name in ("psnr", "ssim", "psnr_bicubic")
        }
        return {**means, "psnr_gain": means["psnr"] - means["psnr_bicubic"]}

    def error_score(self, record: Record) -> float:
        """The negative PSNR."""
        return -float(record["psnr"])

    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """`height` and `width` of the enlarged image, and `scale`."""
        _, height, width = prediction["image"].shape
        return {"height": height, "width": width, "scale": scale_of(prediction)}

    def panels(
        self,
        image: Tensor,
        prediction: Prediction | None,
        target: Target | None,
        data: DataSpec,
    ) -> list[Panel]:
        """The centre of: the input, its bicubic interpolation, the prediction, and the truth.
        Without a target, only the interpolation and the prediction."""
        if prediction is None:
            return [Panel(image)]
        scale = scale_of(prediction)
        plain = enlarge(prediction["low"], scale)
        if target is None:
            shown = {"bicubic": plain, "network": prediction["image"]}
        else:
            record = self.make_record(prediction, target, data)
            pixels = prediction["low"].repeat_interleave(scale, -2).repeat_interleave(scale, -1)
            shown = {
                "input": pixels,
                f"bicubic {record['psnr_bicubic']:.1f} dB": plain,
                f"network {record['psnr']:.1f} dB": prediction["image"],
                "truth": crop_to_multiple(target["image"], scale),
            }
        return [Panel(_centre(pixels), caption) for caption, pixels in shown.items()]

    def sample_panels(self, batch: Batch, data: DataSpec) -> list[list[Panel]]:
        """The first patch of each image, as the network sees it, and its target."""
        std = torch.tensor(data.std)[:, None, None]
        mean = torch.tensor(data.mean)[:, None, None]
        low = to_pixels(batch["image"].detach().float().cpu() * std + mean)
        if low.ndim == 5:
            low = low[:, 0]
        return [
            [Panel(seen, "input"), Panel(target["image"], "truth")]
            for seen, target in zip(low, self.targets(batch))
        ]

    def prediction_to_image(self, prediction: Prediction) -> Tensor:
        image: Tensor = prediction["image"]
        return image


UPSCALING = Upscaling()


def scale_of(prediction: Prediction) -> int:
    """How many times larger a prediction is than its input."""
    image, low = prediction["image"], prediction["low"]
    return int(image.shape[-2] // low.shape[-2])


def reduce(images: Tensor, scale: int) -> Tensor:
    """(..., H, W) in 0..255, sides multiples of the scale -> (..., H / S, W / S), integers as
    float32."""
    height, width = images.shape[-2:]
    low = image_quality.bicubic(images.float(), height // scale, width // scale)
    return low.round().clamp(0, 255)


def enlarge(image: Tensor, scale: int) -> Tensor:
    """uint8 (C, h, w) -> uint8 (C, h*S, w*S) by bicubic."""
    height, width = image.shape[-2:]
    large = image_quality.bicubic(image, height * scale, width * scale)
    return large.round().clamp(0, 255).to(torch.uint8)


def crop_to_multiple(image: Tensor, scale: int) -> Tensor:
    """(C, H, W) cropped on the right and below, so that its sides are multiples of the scale. A
    side shorter than the scale is extended by repeating its edge."""
    for axis in (-2, -1):
        size = image.shape[axis]
        if size < scale:
            index = torch.arange(scale, device=image.device).clamp(max=size - 1)
            image = image.index_select(axis, index)
        else:
            image = image.narrow(axis, 0, size // scale * scale)
    return image


def _measured(image: Tensor, scale: int) -> Tensor:
    """Luma, without the border if the image is larger than that."""
    pixels = image_quality.luma(image)
    if min(pixels.shape[-2:]) <= 2 * scale:
        return pixels
    return pixels[:, scale:-scale, scale:-scale]


def _centre(image: Tensor) -> Tensor:
    for axis in (-2, -1):
        size = image.shape[axis]
        side = min(size, SHOWN_PIXELS)
        image = image.narrow(axis, (size - side) // 2, side)
    return image


def to_pixels(images: Tensor) -> Tensor:
    """float in 0..1 -> uint8 in 0..255."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


class _Normalise:
    """The transform of a user's images."""

    def __init__(self, data: DataSpec) -> None:
        self._mean = torch.tensor(data.mean)[:, None, None]
        self._std = torch.tensor(data.std)[:, None, None]

    def __call__(self, batch: Batch, rng: BatchRng) -> Batch:
        return {**batch, "image": self._normalise(batch["image"])}

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = self._mean.to(images.device), self._std.to(images.device)
        return (images.float() / 255 - mean) / std


class _Whole(_Normalise):
    """The transform of whole images. Each is reduced by itself, so that its padding doesn't affect
    the pixels at its edge."""

    def __init__(self, settings: UpscalingAugment, data: DataSpec) -> None:
        super().__init__(data)
        self._scale = settings.scale

    def __call__(self, batch: Batch, rng: BatchRng) -> Batch:
        scale = self._scale
        highs = [
            crop_to_multiple(image[:, :height, :width], scale)
            for image, (height, width) in zip(batch["image"], batch["extent"].tolist())
        ]
        lows = [reduce(image, scale) for image in highs]
        extent = torch.tensor([low.shape[-2:] for low in lows], device=batch["extent"].device)
        return {
            **batch,
            "image": self._normalise(_pad(lows)),
            "high": _pad(highs).float() / 255,
            "extent": extent,
        }


class _Patches(_Normalise):
    """The transform of training images: one gather for cropping, mirroring and rotating."""

    def __init__(self, settings: UpscalingAugment, data: DataSpec) -> None:
        super().__init__(data)
        self._settings = settings

    def __call__(self, batch: Batch, rng: BatchRng) -> Batch:
        images: Tensor = batch["image"]
        count, channels, _, width = images.shape
        side, patches = self._settings.patch, self._settings.patches
        rows, columns = self._positions(batch["extent"].cpu(), rng)  # device sync
        pixels = rows[..., :, None] * width + columns[..., None, :]
        if self._settings.turn:
            turned = rng.uniform(patches) < 0.5
            pixels = torch.where(turned[..., None, None], pixels.transpose(-1, -2), pixels)
        pixels = pixels.to(images.device, non_blocking=True).reshape(count, 1, -1)
        high = images.flatten(2).gather(2, pixels.expand(-1, channels, -1))
        high = high.view(count, channels, patches, side, side).transpose(1, 2)
        low = reduce(high, self._settings.scale)
        return {**batch, "image": self._normalise(low), "high": high.float() / 255}

    def _positions(self, extent: Tensor, rng: BatchRng) -> tuple[Tensor, Tensor]:
        """Rows and columns of the patches, int64 (B, P, side) each, inside the image. An image
        smaller than a patch is reflected at its edges."""
        side, patches = self._settings.patch, self._settings.patches
        corner = rng.uniform(patches, 2)
        flipped = rng.uniform(patches, 2) < (0.5 if self._settings.flip else 0.0)
        positions = []
        for axis in (0, 1):
            size = extent[:, axis, None]  # (B, 1)
            free = (size - side).clamp(min=0)
            start = (corner[..., axis] * (free + 1)).long().minimum(free)
            along = torch.arange(side).expand(*start.shape, -1)
            along = torch.where(flipped[..., axis, None], side - 1 - along, along)
            positions.append(_mirror(start[..., None] + along, size[..., None]))
        return positions[0], positions[1]


def _pad(images: Sequence[Tensor]) -> Tensor:
    """Images (C, H_i, W_i) as one (B, C, H, W), padded with black on the right and below."""
    height = max(image.shape[-2] for image in images)
    width = max(image.shape[-1] for image in images)
    frame = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for row, image in zip(frame, images):
        row[:, : image.shape[-2], : image.shape[-1]] = image
    return frame


def _mirror(index: Tensor, size: Tensor) -> Tensor:
    """Indices beyond the last, reflected as often as needed; the edge pixel is repeated."""
    index = index.remainder(2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)
