"""What each corruption does to one picture.

In: a picture, its random numbers, how much larger it is than those that the constants are for
(`zoom`), and the constants. Out: the picture corrupted; not yet cut to 0..1. Must not know where the
constants come from, nor that there are other pictures.

    C channels, h height, w width
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]
"""(C, h, w) in 0..1: the part of a frame that is picture."""


def to_bytes(picture: NDArray[Any]) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)
    return rounded


def gaussian_noise(
    picture: Picture, numbers: np.random.Generator, zoom: float, deviation: float
) -> NDArray[Any]:
    return picture + deviation * numbers.standard_normal(picture.shape, np.float32)


def shot_noise(
    picture: Picture, numbers: np.random.Generator, zoom: float, photons: float
) -> NDArray[Any]:
    return numbers.poisson(picture * photons) / photons


def impulse_noise(
    picture: Picture, numbers: np.random.Generator, zoom: float, share: float
) -> NDArray[Any]:
    drawn = numbers.random(picture.shape, np.float32)
    salted = np.where(drawn > 1 - share / 2, np.float32(1), picture)
    return np.where(drawn < share / 2, np.float32(0), salted)


def defocus_blur(
    picture: Picture, numbers: np.random.Generator, zoom: float, radius: float, smoothing: float
) -> NDArray[Any]:
    # A disc of radius r spreads by r / 2 along each axis, a bell by its standard deviation.
    wide = zoom * float(np.hypot(radius, 2 * smoothing))
    steps = max(8, int(np.ceil(2 * wide)))
    line = np.arange(-steps, steps + 1) / steps
    rows, columns = np.meshgrid(line, line)
    inside = np.hypot(rows, columns) <= 1
    return _spread(picture, rows[inside] * wide, columns[inside] * wide, np.ones(inside.sum()))


def motion_blur(
    picture: Picture, numbers: np.random.Generator, zoom: float, radius: float, deviation: float
) -> NDArray[Any]:
    angle = np.radians(numbers.uniform(-45, 45))
    length = 2 * radius * zoom
    way = np.linspace(0, length, max(9, int(np.ceil(4 * length))))
    weights = np.exp(-0.5 * (way / (deviation * zoom)) ** 2)
    way -= np.average(way, weights=weights)
    return _spread(picture, way * np.sin(angle), way * np.cos(angle), weights)


def _spread(
    picture: Picture, rows: NDArray[Any], columns: NDArray[Any], weights: NDArray[Any]
) -> NDArray[Any]:
    """The weighted mean of the picture, moved to each of some places, which may lie between pixels.
    Beyond its edge the picture is mirrored."""
    reach = int(np.ceil(max(np.abs(rows).max(), np.abs(columns).max()))) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    for down, below in ((0, 1 - (rows - top)), (1, rows - top)):
        for right, beside in ((0, 1 - (columns - left)), (1, columns - left)):
            place = (top + reach + down, left + reach + right)
            np.add.at(kernel, place, weights * below * beside)
    padded = np.pad(picture, ((0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    size = padded.shape[1:]
    product = np.fft.rfft2(padded) * np.fft.rfft2(kernel / kernel.sum(), size)
    return np.fft.irfft2(product, size)[:, 2 * reach :, 2 * reach :]


def brightness(
    picture: Picture, numbers: np.random.Generator, zoom: float, added: float
) -> NDArray[Any]:
    """More value, in the sense of HSV; hue and saturation stay."""
    value = picture.max(0)
    brighter = np.minimum(value + np.float32(added), 1)
    times = brighter / np.where(value > 0, value, 1)
    made: NDArray[Any] = np.where(value > 0, picture * times, brighter)
    return made


def contrast(
    picture: Picture, numbers: np.random.Generator, zoom: float, kept: float
) -> NDArray[Any]:
    mean = picture.mean((1, 2), keepdims=True)
    made: NDArray[Any] = mean + kept * (picture - mean)
    return made


def saturation(
    picture: Picture, numbers: np.random.Generator, zoom: float, times: float, added: float
) -> NDArray[Any]:
    """More saturation, in the sense of HSV; hue and value stay."""
    value = picture.max(0)
    away = value - picture
    before = away.max(0) / np.where(value > 0, value, 1)
    after = np.minimum(before * times + added, 1)
    made: NDArray[Any] = value - away * np.where(
        before > 0, after / np.where(before > 0, before, 1), 1
    )
    return made


def jpeg_compression(
    picture: Picture, numbers: np.random.Generator, zoom: float, quality: float
) -> NDArray[Any]:
    from PIL import Image

    with io.BytesIO() as file:
        colours_last = to_bytes(picture).transpose(1, 2, 0)
        grey = colours_last.shape[2] == 1
        shown = Image.fromarray(colours_last[:, :, 0] if grey else colours_last)
        shown.save(file, "JPEG", quality=round(quality))
        read = np.asarray(Image.open(file), np.float32) / 255
    return read[None] if grey else read.transpose(2, 0, 1)


def pixelate(
    picture: Picture, numbers: np.random.Generator, zoom: float, share: float
) -> NDArray[Any]:
    rows, columns = (_coarse(side, max(1, int(side * share))) for side in picture.shape[1:])
    return rows @ picture @ columns.T


def _coarse(side: int, fewer: int) -> NDArray[np.float32]:
    """(side, side): makes so many pixels of a line, and of these as many as before. Each is the mean
    of what it covers."""
    ends = np.arange(fewer + 1) * (side / fewer)
    old, made = np.arange(side), ends[:-1, None]
    covered = np.minimum(ends[1:, None], old + 1) - np.maximum(made, old)
    covered = np.clip(covered, 0, None).astype(np.float32)
    there_and_back: NDArray[np.float32] = covered.T @ (covered * np.float32(fewer / side))
    return there_and_back


def fog(
    picture: Picture, numbers: np.random.Generator, zoom: float, thickness: float, decay: float
) -> NDArray[Any]:
    height, width = picture.shape[1:]
    clouds = _clouds(numbers, 1 << (max(height, width) - 1).bit_length(), decay)[:height, :width]
    most = picture.max()
    made: NDArray[Any] = (picture + thickness * clouds) * (most / (most + thickness))
    return made


def _clouds(numbers: np.random.Generator, side: int, decay: float) -> NDArray[Any]:
    """(side, side) in 0..1, which is a power of two: the diamond-square algorithm of Fournier et al.,
    Computer Rendering of Stochastic Models, 1982, on a torus. Details of half the size are as many
    times fainter as the square of `decay`."""
    field = np.zeros((side, side))
    step, height = side, 1.0
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        squares = corners + np.roll(corners, -1, 0)
        squares = squares + np.roll(squares, -1, 1)
        middles = squares / 4 + height * numbers.uniform(-1, 1, squares.shape)
        field[half::step, half::step] = middles
        for axis in (0, 1):
            sides = middles + np.roll(middles, 1, axis) + corners + np.roll(corners, -1, 1 - axis)
            sides = sides / 4 + height * numbers.uniform(-1, 1, sides.shape)
            field[half * axis :: step, half * (1 - axis) :: step] = sides
        step, height = half, height / decay**2
    field -= field.min()
    return field / (field.max() or 1.0)
