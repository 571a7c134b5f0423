"""Corrupts images as a poor camera, bad weather or careless storage would.

In: uint8 images as a loader gives them. Out: the same images, corrupted. Must not know networks,
labels, nor what the images are for.

    B images, C channels, H height, W width of a frame; h, w of the image in it

The kinds are those of Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations, 2019. So are the constants, which their repository
(hendrycks/robustness, Apache-2.0) has for images of 32 pixels (CIFAR-10-C) and of 224 (ImageNet-C).
Strengths 1, 2, 3 are their severities 1, 3, 5. Between the two sizes a constant is interpolated by
the logarithm of the image's shorter side. Beyond them it is constant, except that widths of blurs,
which are in pixels, scale with the image. Nothing moves in the image: boxes and masks stay valid.
Differences from theirs:

- `elastic_transform` is left out, because it would move boxes and masks; `glass_blur`, `zoom_blur`,
  `snow` and `frost` are left out, too;
- `motion_blur` is centred on each pixel; theirs moves the image to one side;
- the disc of `defocus_blur` is as wide as theirs and its smoothing together; both blurs interpolate
  between pixels, so blurs of less than a pixel have an effect;
- `pixelate` weights pixels by the exact area that they share, as images of a few pixels need it;
- `saturation` has their severities 3, 4, 5, which all add colour: 1 and 2 remove some. A grey pixel
  has no hue and stays grey;
- a sample's random numbers start alike at each strength: mostly it is the same noise, only
  stronger, so strengths can be compared.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.core.errors import UsageError, unknown
from pipelines.evaluation.sample_rng import sample_rng

STRENGTHS = (1, 2, 3)
SMALL, LARGE = 32, 224
"""Sides in pixels of the images that the constants are for."""
Constants = tuple[float, ...]
ImageArray = NDArray[np.float32]
"""(C, h, w) in 0..1: the image without the frame around it."""


def _to_bytes(image: NDArray[Any]) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
    return rounded


def _gaussian_noise(
    image: ImageArray, rng: np.random.Generator, zoom: float, deviation: float
) -> NDArray[Any]:
    return image + deviation * rng.standard_normal(image.shape, np.float32)


def _shot_noise(
    image: ImageArray, rng: np.random.Generator, zoom: float, photons: float
) -> NDArray[Any]:
    return rng.poisson(image * photons) / photons


def _impulse_noise(
    image: ImageArray, rng: np.random.Generator, zoom: float, share: float
) -> NDArray[Any]:
    drawn = rng.random(image.shape, np.float32)
    salted = np.where(drawn > 1 - share / 2, np.float32(1), image)
    return np.where(drawn < share / 2, np.float32(0), salted)


def _defocus_blur(
    image: ImageArray, rng: np.random.Generator, zoom: float, radius: float, smoothing: float
) -> NDArray[Any]:
    # A disc of radius r has a standard deviation of r / 2 along each axis.
    wide = zoom * float(np.hypot(radius, 2 * smoothing))
    steps = max(8, int(np.ceil(2 * wide)))
    line = np.arange(-steps, steps + 1) / steps
    rows, columns = np.meshgrid(line, line)
    inside = np.hypot(rows, columns) <= 1
    return _spread(image, rows[inside] * wide, columns[inside] * wide, np.ones(inside.sum()))


def _motion_blur(
    image: ImageArray, rng: np.random.Generator, zoom: float, radius: float, deviation: float
) -> NDArray[Any]:
    angle = np.radians(rng.uniform(-45, 45))
    length = 2 * radius * zoom
    way = np.linspace(0, length, max(9, int(np.ceil(4 * length))))
    weights = np.exp(-0.5 * (way / (deviation * zoom)) ** 2)
    way -= np.average(way, weights=weights)
    return _spread(image, way * np.sin(angle), way * np.cos(angle), weights)


def _spread(
    image: ImageArray, rows: NDArray[Any], columns: NDArray[Any], weights: NDArray[Any]
) -> NDArray[Any]:
    """The weighted mean of the image, shifted by each of (rows, columns), which may be fractions of
    pixels. The image is mirrored at its edges."""
    reach = int(np.ceil(max(np.abs(rows).max(), np.abs(columns).max()))) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    for down, below in ((0, 1 - (rows - top)), (1, rows - top)):
        for right, beside in ((0, 1 - (columns - left)), (1, columns - left)):
            position = (top + reach + down, left + reach + right)
            np.add.at(kernel, position, weights * below * beside)
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    size = padded.shape[1:]
    product = np.fft.rfft2(padded) * np.fft.rfft2(kernel / kernel.sum(), size)
    return np.fft.irfft2(product, size)[:, 2 * reach :, 2 * reach :]


def _brightness(
    image: ImageArray, rng: np.random.Generator, zoom: float, added: float
) -> NDArray[Any]:
    """Adds to the value of HSV; hue and saturation stay."""
    value = image.max(0)
    brighter = np.minimum(value + np.float32(added), 1)
    times = brighter / np.where(value > 0, value, 1)
    made: NDArray[Any] = np.where(value > 0, image * times, brighter)
    return made


def _contrast(
    image: ImageArray, rng: np.random.Generator, zoom: float, kept: float
) -> NDArray[Any]:
    mean = image.mean((1, 2), keepdims=True)
    made: NDArray[Any] = mean + kept * (image - mean)
    return made


def _saturation(
    image: ImageArray, rng: np.random.Generator, zoom: float, times: float, added: float
) -> NDArray[Any]:
    """Adds to the saturation of HSV; hue and value stay."""
    value = image.max(0)
    away = value - image
    before = away.max(0) / np.where(value > 0, value, 1)
    after = np.minimum(before * times + added, 1)
    made: NDArray[Any] = value - away * np.where(
        before > 0, after / np.where(before > 0, before, 1), 1
    )
    return made


def _jpeg_compression(
    image: ImageArray, rng: np.random.Generator, zoom: float, quality: float
) -> NDArray[Any]:
    from PIL import Image

    with io.BytesIO() as file:
        colours_last = _to_bytes(image).transpose(1, 2, 0)
        grey = colours_last.shape[2] == 1
        shown = Image.fromarray(colours_last[:, :, 0] if grey else colours_last)
        shown.save(file, "JPEG", quality=round(quality))
        read = np.asarray(Image.open(file), np.float32) / 255
    return read[None] if grey else read.transpose(2, 0, 1)


def _pixelate(
    image: ImageArray, rng: np.random.Generator, zoom: float, share: float
) -> NDArray[Any]:
    rows, columns = (_coarse(side, max(1, int(side * share))) for side in image.shape[1:])
    return rows @ image @ columns.T


def _coarse(side: int, fewer: int) -> NDArray[np.float32]:
    """(side, side): scales a line of pixels down to `fewer` and up again. Each pixel is the mean of
    the area that it covers."""
    ends = np.arange(fewer + 1) * (side / fewer)
    old, made = np.arange(side), ends[:-1, None]
    covered = np.minimum(ends[1:, None], old + 1) - np.maximum(made, old)
    covered = np.clip(covered, 0, None).astype(np.float32)
    there_and_back: NDArray[np.float32] = covered.T @ (covered * np.float32(fewer / side))
    return there_and_back


def _fog(
    image: ImageArray, rng: np.random.Generator, zoom: float, thickness: float, decay: float
) -> NDArray[Any]:
    height, width = image.shape[1:]
    clouds = _clouds(rng, 1 << (max(height, width) - 1).bit_length(), decay)[:height, :width]
    most = image.max()
    made: NDArray[Any] = (image + thickness * clouds) * (most / (most + thickness))
    return made


def _clouds(rng: np.random.Generator, side: int, decay: float) -> NDArray[Any]:
    """(side, side) in 0..1, for a side that is a power of two: the diamond-square algorithm of
    Fournier et al., Computer Rendering of Stochastic Models, 1982, on a torus. Details of half the
    size are fainter by the square of `decay`."""
    field = np.zeros((side, side))
    step, height = side, 1.0
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        squares = corners + np.roll(corners, -1, 0)
        squares = squares + np.roll(squares, -1, 1)
        middles = squares / 4 + height * rng.uniform(-1, 1, squares.shape)
        field[half::step, half::step] = middles
        for axis in (0, 1):
            sides = middles + np.roll(middles, 1, axis) + corners + np.roll(corners, -1, 1 - axis)
            sides = sides / 4 + height * rng.uniform(-1, 1, sides.shape)
            field[half * axis :: step, half * (1 - axis) :: step] = sides
        step, height = half, height / decay**2
    field -= field.min()
    return field / (field.max() or 1.0)


class _Kind(NamedTuple):
    """`corrupt(image, rng, zoom, *constants)`. A row of constants for each strength, for small and
    for large images; `zoom` is the image's size relative to the nearest size that has constants."""

    corrupt: Callable[..., NDArray[Any]]
    small: tuple[Constants, Constants, Constants]
    large: tuple[Constants, Constants, Constants]


_KINDS = {
    "gaussian_noise": _Kind(
        _gaussian_noise, ((0.04,), (0.08,), (0.10,)), ((0.08,), (0.18,), (0.38,))
    ),
    "shot_noise": _Kind(_shot_noise, ((500,), (100,), (50,)), ((60,), (12,), (3,))),
    "impulse_noise": _Kind(
        _impulse_noise, ((0.01,), (0.03,), (0.07,)), ((0.03,), (0.09,), (0.27,))
    ),
    "defocus_blur": _Kind(
        _defocus_blur,
        ((0.3, 0.4), (0.5, 0.6), (1.5, 0.1)),
        ((3, 0.1), (6, 0.5), (10, 0.5)),
    ),
    "motion_blur": _Kind(_motion_blur, ((6, 1), (6, 2), (9, 2.5)), ((10, 3), (15, 8), (20, 15))),
    "brightness": _Kind(_brightness, ((0.05,), (0.15,), (0.3,)), ((0.1,), (0.3,), (0.5,))),
    "contrast": _Kind(_contrast, ((0.75,), (0.4,), (0.15,)), ((0.4,), (0.2,), (0.05,))),
    "saturation": _Kind(
        _saturation, ((1.5, 0), (2, 0.1), (2.5, 0.2)), ((2, 0), (5, 0.1), (20, 0.2))
    ),
    "jpeg_compression": _Kind(_jpeg_compression, ((80,), (58,), (40,)), ((25,), (15,), (7,))),
    "pixelate": _Kind(_pixelate, ((0.95,), (0.85,), (0.65,)), ((0.6,), (0.4,), (0.25,))),
    "fog": _Kind(_fog, ((0.2, 3), (0.75, 2.5), (1.5, 1.75)), ((1.5, 2), (2.5, 1.7), (3, 1.4))),
}
KINDS = tuple(_KINDS)


def kinds_for(channels: int) -> tuple[str, ...]:
    """The corruptions for images of so many channels."""
    return tuple(kind for kind in KINDS if channels == 3 or kind != "saturation")


def corrupt(
    images: Tensor,
    kind: str,
    strength: int,
    numbers: Sequence[int],
    extent: Tensor | None = None,
) -> Tensor:
    """Corrupts uint8 images (B, C, H, W). Returns the same shape and type on the same device.

    `numbers` are the samples' positions in their split: with kind and strength they determine the
    result, whatever batch a sample is in. `extent` (B, 2) is the height and width of each image in
    its frame; the rest of the frame stays unchanged. Computed on the CPU, so the result is the same
    for every device. Raises UsageError for an unknown kind or strength, and for other images.
    """
    _check(images, kind, strength, numbers)
    corrupted = images.cpu().numpy().copy()
    sizes = [list(images.shape[-2:])] * len(corrupted) if extent is None else extent.tolist()
    for image, number, (height, width) in zip(corrupted, numbers, sizes, strict=True):
        if height and width:
            part = image[:, :height, :width]
            pixels = part.astype(np.float32) / 255
            zoom, constants = _scaled(_KINDS[kind], strength, min(height, width))
            part[...] = _to_bytes(
                _KINDS[kind].corrupt(pixels, sample_rng(kind, number), zoom, *constants)
            )
    return torch.from_numpy(corrupted).to(images.device)


def _check(images: Tensor, kind: str, strength: int, numbers: Sequence[int]) -> None:
    if kind not in KINDS:
        raise unknown("corruption", kind, KINDS)
    if strength not in STRENGTHS:
        raise UsageError(f"{strength} is not a valid strength", hint=f"use one of {STRENGTHS}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UsageError(
            f"images of {images.dtype} {tuple(images.shape)} can't be corrupted",
            hint="use uint8 (B, C, H, W) with 1 or 3 channels",
        )
    if kind not in kinds_for(images.shape[1]):
        raise UsageError(f"{kind} needs colour images", hint="see kinds_for")
    if len(numbers) != len(images):
        raise UsageError(
            f"{len(numbers)} numbers for {len(images)} images", hint="give one number per image"
        )


def _scaled(kind: _Kind, strength: int, side: int) -> tuple[float, Constants]:
    """Returns (zoom, constants) for an image with this shorter side."""
    near = min(max(side, SMALL), LARGE)
    share = float(np.log(near / SMALL) / np.log(LARGE / SMALL))
    pairs = zip(kind.small[strength - 1], kind.large[strength - 1])
    return side / near, tuple(a * (b / a) ** share if a else 0.0 for a, b in pairs)
