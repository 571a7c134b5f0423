"""Random changes of light and colour, and random erasing, of a batch of images.

In: float images in 0..1 or, for erasing, normalised ones, on their device, and the batch's random
numbers. Out: the changed images. Every operation is torchvision's
(`torchvision.transforms.v2.functional`), with a number of its own for each image. Must not know
annotations.

    B images, C channels, H height, W width
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.core.errors import UsageError
from models.core.family import BatchRng

_LUMA = (0.2989, 0.587, 0.114)
ERASED_SHARE = (0.02, 0.33)
ERASED_RATIO = (0.3, 3.3)
"""Smallest and largest area, and ratio of height to width, of an erased rectangle: Zhong et
al., Random Erasing Data Augmentation, 2017."""


@dataclass(frozen=True)
class ColourSettings:
    """Settings of an augmentation that begin with `augment.`; tasks add them to their own."""

    brightness: float = 0.0
    """Multiply the pixels by 1 ± up to this share."""
    contrast: float = 0.0
    """Change the contrast by a factor of 1 ± up to this share."""
    saturation: float = 0.0
    """Change the saturation by a factor of 1 ± up to this share; colour images only."""
    hue: float = 0.0
    """Turn the hue by up to this share of the circle, at most 0.5; colour images only."""
    greyscale: float = 0.0
    """Probability that a training image loses its colours."""
    erasing: float = 0.0
    """Probability that a random rectangle of a training image is blanked."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "greyscale", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"augment.{name} = {getattr(self, name)}", hint="give 0 to 1")
        if not 0 <= self.hue <= 0.5:
            raise UsageError(f"augment.hue = {self.hue}", hint="give 0 to 0.5")

    @property
    def changes_colours(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.greyscale))


def change_colours(images: Tensor, settings: ColourSettings, rng: BatchRng) -> Tensor:
    """float (B, C, H, W) in 0..1 -> the same: brightness, contrast, saturation and hue in this
    order, then greyscale. Numbers are only drawn for settings that are on."""
    if settings.brightness:
        images = adjust_brightness(images, _factors(settings.brightness, rng, images))
    if settings.contrast:
        images = adjust_contrast(images, _factors(settings.contrast, rng, images))
    if settings.saturation:
        images = adjust_saturation(images, _factors(settings.saturation, rng, images))
    if settings.hue:
        turns = (2 * rng.uniform(1, 1, 1) - 1) * settings.hue
        images = adjust_hue(images, turns.to(images.device, non_blocking=True))
    if settings.greyscale:
        chosen = (rng.uniform(1, 1, 1) < settings.greyscale).to(images.device, non_blocking=True)
        images = torch.where(chosen, _grey(images), images)
    return images


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """`factors` (B, 1, 1, 1), also below."""
    return (images * factors).clamp(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    mean = _grey(images).mean((1, 2, 3), keepdim=True)
    return ((images - mean) * factors + mean).clamp(0, 1)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    grey = _grey(images)
    return ((images - grey) * factors + grey).clamp(0, 1)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """`turns` (B, 1, 1, 1) are shares of the circle."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.unbind(1)
    highest, most = images.max(1)
    spread = highest - images.amin(1)
    safe = torch.where(spread > 0, spread, 1)
    sixths = torch.stack(
        ((green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe), 1
    )
    hue = sixths.gather(1, most[:, None])[:, 0] / 6 + turns[:, 0]
    # The value of each channel is the highest, less as much of the spread as the hue is away from
    # the third of the circle in which this channel is the highest.
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    distance = (offsets + hue[:, None] * 6) % 6
    share = torch.minimum(distance, 4 - distance).clamp(0, 1)
    return highest[:, None] - spread[:, None] * share


def erase(images: Tensor, probability: float, rng: BatchRng, value: float = 0.0) -> Tensor:
    """Blanks a rectangle of some images, with `value`. A rectangle that is larger than the image
    becomes as large as the image."""
    height, width = images.shape[-2:]
    chosen, area, ratio, top, left = rng.uniform(5).unbind(1)
    low, high = ERASED_SHARE
    pixels = height * width * (low + area * (high - low))
    logs = [math.log(edge) for edge in ERASED_RATIO]
    aspect = (logs[0] + ratio * (logs[1] - logs[0])).exp()
    tall = (pixels * aspect).sqrt().round().clamp(1, height)
    wide = (pixels / aspect).sqrt().round().clamp(1, width)
    first_row = (top * (height - tall + 1)).floor()
    first_column = (left * (width - wide + 1)).floor()
    tall = torch.where(chosen < probability, tall, 0)
    edges = torch.stack((first_row, first_row + tall, first_column, first_column + wide), 1)
    edges = edges.to(images.device, non_blocking=True)[:, :, None]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= edges[:, 0]) & (rows < edges[:, 1])
    in_columns = (columns >= edges[:, 2]) & (columns < edges[:, 3])
    return images.masked_fill(in_rows[:, None, :, None] & in_columns[:, None, None, :], value)


def _factors(amount: float, rng: BatchRng, images: Tensor) -> Tensor:
    factors = 1 + amount * (2 * rng.uniform(1, 1, 1) - 1)
    return factors.to(images.device, non_blocking=True)


def _grey(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W)."""
    if images.shape[1] != 3:
        return images
    weights = torch.tensor(_LUMA, device=images.device)[:, None, None]
    return (images * weights).sum(1, keepdim=True)
