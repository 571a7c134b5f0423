"""Upscaling: an image with more pixels than it was given.

In: uint8 images, of which a smaller one is made to be enlarged again. Out: images as the network
sees them, with what is to be made of them; how near to that an enlarged image came, and how near
bicubic enlarging comes. Must not know any network.

    B images, P patches of each, C channels, H height, W width, S scale; h = H / S, w = W / S

The small image is the large one reduced by an antialiased bicubic and rounded, as a stored image
would be: what articles call BI. A transformed batch has in training `image` (B, P, C, h, w),
normalised, and `high` (B, P, C, H, W) in 0..1; in an evaluation the whole images, `image`
(B, C, h, w) and `high` (B, C, H, W), with `extent` (B, 2) of what is picture in `image`; and of a
user's image, which is not reduced, no `high`. A target has `image` uint8 (C, H, W). A prediction
has `image` uint8 (C, h*S, w*S) and `low` uint8 (C, h, w), what it was made of.
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
"""Side of the cut-out that is looked at, in pixels of the large image."""


@dataclass(frozen=True)
class UpscalingAugment:
    """`scale`: how many times smaller the images are made; the network's `model.scale` is the same.
    In training, `patches` random squares of `patch` pixels (in the large image) are cut out of each
    image in a step; `flip` mirrors half of them left to right and half of them upside down, `turn`
    gives half of them a quarter turn."""

    scale: int = 2
    patch: int = 72
    patches: int = 4
    flip: bool = True
    turn: bool = True

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise UsageError(f"augment.scale = {self.scale}", hint="give 2, 3 or 4")
        if self.patch < self.scale or self.patch % self.scale:
            raise UsageError(
                f"augment.patch = {self.patch} with augment.scale = {self.scale}",
                hint="give a multiple of the scale; 72 and 96 are of 2, 3 and 4",
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
        """The whole images; of a training batch, which has patches, the first of each image."""
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
        return _AsItIs(data)

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """`psnr` and `ssim`, and `psnr_bicubic` of the enlarging that needs no network. All on luma
        without a border of S pixels, as in the articles."""
        made, low = prediction["image"], prediction["low"]
        scale = scale_of(prediction)
        truth = whole_multiple(target["image"], scale)
        if truth.shape != made.shape:
            raise TesseraError(
                f"an image of {tuple(made.shape)} was made where one of {tuple(truth.shape)} is "
                "the truth"
            )
        true, ours, plain = (_measured(i, scale) for i in (truth, made, enlarge(low, scale)))
        return {
            "psnr": image_quality.psnr(ours, true, peak=255),
            "ssim": image_quality.ssim(ours, true, peak=255),
            "psnr_bicubic": image_quality.psnr(plain, true, peak=255),
        }

    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """Means over the images: `psnr` in dB, `ssim`, `psnr_bicubic`, and `psnr_gain` in dB, by
        which the network is better than bicubic enlarging."""
        if not records:
            raise TesseraError("there is no answer to make figures of")
        means = {
            name: math.fsum(record[name] for record in records) / len(records)
            for name in ("psnr", "ssim", "psnr_bicubic")
        }
        return {**means, "psnr_gain": means["psnr"] - means["psnr_bicubic"]}

    def error_score(self, record: Record) -> float:
        """The noise in dB, relative to the signal."""
        return -float(record["psnr"])

    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """`height` and `width` of the image that was made, and `scale`."""
        _, height, width = prediction["image"].shape
        return {"height": height, "width": width, "scale": scale_of(prediction)}

    def panels(
        self,
        image: Tensor,
        prediction: Prediction | None,
        target: Target | None,
        data: DataSpec,
    ) -> list[Panel]:
        """The middle, side by side: as given, enlarged by bicubic, as the network made it, and what
        it should be; of an image whose truth nobody knows, bicubic and network alone."""
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
                "given": pixels,
                f"bicubic {record['psnr_bicubic']:.1f} dB": plain,
                f"network {record['psnr']:.1f} dB": prediction["image"],
                "truth": whole_multiple(target["image"], scale),
            }
        return [Panel(_middle(pixels), caption) for caption, pixels in shown.items()]

    def sample_panels(self, batch: Batch, data: DataSpec) -> list[list[Panel]]:
        """Of each image the first patch, as the network sees it and as it should make it."""
        std = torch.tensor(data.std)[:, None, None]
        mean = torch.tensor(data.mean)[:, None, None]
        low = to_pixels(batch["image"].detach().float().cpu() * std + mean)
        if low.ndim == 5:
            low = low[:, 0]
        return [
            [Panel(seen, "sees"), Panel(target["image"], "truth")]
            for seen, target in zip(low, self.targets(batch))
        ]

    def prediction_to_image(self, prediction: Prediction) -> Tensor:
        image: Tensor = prediction["image"]
        return image


UPSCALING = Upscaling()


def scale_of(prediction: Prediction) -> int:
    made, low = prediction["image"], prediction["low"]
    return int(made.shape[-2] // low.shape[-2])


def reduce(images: Tensor, scale: int) -> Tensor:
    """(..., H, W) of 0..255, sides multiples of the scale -> (..., H / S, W / S), whole numbers as
    float32."""
    height, width = images.shape[-2:]
    low = image_quality.bicubic(images.float(), height // scale, width // scale)
    return low.round().clamp(0, 255)


def enlarge(image: Tensor, scale: int) -> Tensor:
    """uint8 (C, h, w) -> uint8 (C, h*S, w*S) by bicubic."""
    height, width = image.shape[-2:]
    large = image_quality.bicubic(image, height * scale, width * scale)
    return large.round().clamp(0, 255).to(torch.uint8)


def whole_multiple(image: Tensor, scale: int) -> Tensor:
    """(C, H, W), cut at the right and below so that the sides are multiples of the scale; a side
    that is shorter than the scale is continued by its edge."""
    for axis in (-2, -1):
        size = image.shape[axis]
        if size < scale:
            at = torch.arange(scale, device=image.device).clamp(max=size - 1)
            image = image.index_select(axis, at)
        else:
            image = image.narrow(axis, 0, size // scale * scale)
    return image


def _measured(image: Tensor, scale: int) -> Tensor:
    """Luma without the border, where an image is large enough to have an inside."""
    pixels = image_quality.luma(image)
    if min(pixels.shape[-2:]) <= 2 * scale:
        return pixels
    return pixels[:, scale:-scale, scale:-scale]


def _middle(image: Tensor) -> Tensor:
    for axis in (-2, -1):
        size = image.shape[axis]
        side = min(size, SHOWN_PIXELS)
        image = image.narrow(axis, (size - side) // 2, side)
    return image


def to_pixels(images: Tensor) -> Tensor:
    """uint8 of 0..255 from float of 0..1."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


class _AsItIs:
    """The transform on a user's images: normalised."""

    def __init__(self, data: DataSpec) -> None:
        self._mean = torch.tensor(data.mean)[:, None, None]
        self._std = torch.tensor(data.std)[:, None, None]

    def __call__(self, batch: Batch, draws: BatchRng) -> Batch:
        return {**batch, "image": self._normalise(batch["image"])}

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = self._mean.to(images.device), self._std.to(images.device)
        return (images.float() / 255 - mean) / std


class _Whole(_AsItIs):
    """The transform on whole images: each is reduced by itself, as the last of a frame's picture
    must not see what the frame is filled with."""

    def __init__(self, settings: UpscalingAugment, data: DataSpec) -> None:
        super().__init__(data)
        self._scale = settings.scale

    def __call__(self, batch: Batch, draws: BatchRng) -> Batch:
        scale = self._scale
        highs = [
            whole_multiple(image[:, :height, :width], scale)
            for image, (height, width) in zip(batch["image"], batch["extent"].tolist())
        ]
        lows = [reduce(image, scale) for image in highs]
        extent = torch.tensor([low.shape[-2:] for low in lows], device=batch["extent"].device)
        return {
            **batch,
            "image": self._normalise(_framed(lows)),
            "high": _framed(highs).float() / 255,
            "extent": extent,
        }


class _Patches(_AsItIs):
    """The transform on training images: one gather for cutting, mirroring and turning."""

    def __init__(self, settings: UpscalingAugment, data: DataSpec) -> None:
        super().__init__(data)
        self._settings = settings

    def __call__(self, batch: Batch, draws: BatchRng) -> Batch:
        images: Tensor = batch["image"]
        count, channels, _, width = images.shape
        side, patches = self._settings.patch, self._settings.patches
        rows, columns = self._places(batch["extent"].cpu(), draws)  # device sync
        pixels = rows[..., :, None] * width + columns[..., None, :]
        if self._settings.turn:
            turned = draws.uniform(patches) < 0.5
            pixels = torch.where(turned[..., None, None], pixels.transpose(-1, -2), pixels)
        pixels = pixels.to(images.device, non_blocking=True).reshape(count, 1, -1)
        high = images.flatten(2).gather(2, pixels.expand(-1, channels, -1))
        high = high.view(count, channels, patches, side, side).transpose(1, 2)
        low = reduce(high, self._settings.scale)
        return {**batch, "image": self._normalise(low), "high": high.float() / 255}

    def _places(self, extent: Tensor, draws: BatchRng) -> tuple[Tensor, Tensor]:
        """Rows and columns of the patches, int64 (B, P, side) each, inside the picture; a smaller
        picture is mirrored at its edges."""
        side, patches = self._settings.patch, self._settings.patches
        corner = draws.uniform(patches, 2)
        flipped = draws.uniform(patches, 2) < (0.5 if self._settings.flip else 0.0)
        places = []
        for axis in (0, 1):
            size = extent[:, axis, None]  # (B, 1)
            free = (size - side).clamp(min=0)
            start = (corner[..., axis] * (free + 1)).long().minimum(free)
            along = torch.arange(side).expand(*start.shape, -1)
            along = torch.where(flipped[..., axis, None], side - 1 - along, along)
            places.append(_mirror(start[..., None] + along, size[..., None]))
        return places[0], places[1]


def _framed(images: Sequence[Tensor]) -> Tensor:
    """(B, C, H, W) of images (C, H_i, W_i), black to the right and below."""
    height = max(image.shape[-2] for image in images)
    width = max(image.shape[-1] for image in images)
    frame = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for place, image in zip(frame, images):
        place[:, : image.shape[-2], : image.shape[-1]] = image
    return frame


def _mirror(index: Tensor, size: Tensor) -> Tensor:
    """Indices beyond the last, mirrored there, as often as needed; the edge is repeated."""
    index = index.remainder(2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)
