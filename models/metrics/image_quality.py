"""How near an image is to what it should be: mean squared error, PSNR, SSIM; luma, bicubic resizing.

In: images as float or uint8 tensors. Out: numbers, and images as float64. Everything is computed in
float64, an image at a time, so a figure depends neither on the batch nor on the precision of the
network. Must not know networks or tasks.

    C channels, H height, W width

`peak` is the largest value that a pixel can have: 255, or 1 for pixels scaled to 0..1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.core.errors import TesseraError

MOST_DECIBELS = 100.0
"""The PSNR of equal images, and the most that is given: means over images stay finite."""
WINDOW, SIGMA = 11, 1.5
"""SSIM's Gaussian window in pixels, as in the article."""
_SUPPORT = 4.0
"""Pixels under the cubic kernel."""


def mse(image: Tensor, other: Tensor) -> float:
    """Mean squared difference of two images of one shape, in squared units of their pixels."""
    first, second = _pair(image, other)
    return float((first - second).square().mean())


def psnr(image: Tensor, other: Tensor, *, peak: float) -> float:
    """Peak signal-to-noise ratio of two images of one shape in dB, at most `MOST_DECIBELS`."""
    return decibels(mse(image, other), peak=peak)


def decibels(error: float, *, peak: float) -> float:
    """The PSNR in dB that a mean squared error stands for, at most `MOST_DECIBELS`."""
    if error <= 0:
        return MOST_DECIBELS
    return min(10 * math.log10(peak * peak / error), MOST_DECIBELS)


def ssim(image: Tensor, other: Tensor, *, peak: float) -> float:
    """Structural similarity of two images (C, H, W), at most 1: Wang et al., Image Quality
    Assessment: From Error Visibility to Structural Similarity, 2004.

    Means, variances and covariance under a Gaussian window of 11 by 11 pixels with a standard
    deviation of 1.5; the mean over the places where the window lies inside the image, and over the
    channels. Where the image is smaller than the window, the window is cut to it.
    """
    first, second = _pair(image, other)
    moments = torch.stack([first, second, first * first, second * second, first * second])
    for axis in (-2, -1):
        moments = _blur(moments, axis)
    mean, mean_other, square, square_other, product = moments
    variance, variance_other = square - mean * mean, square_other - mean_other * mean_other
    covariance = product - mean * mean_other
    flat, dark = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    above = (2 * mean * mean_other + flat) * (2 * covariance + dark)
    below = (mean * mean + mean_other * mean_other + flat) * (variance + variance_other + dark)
    return float((above / below).mean())


def luma(image: Tensor) -> Tensor:
    """(3, H, W) of RGB in 0..255 -> (1, H, W) of float64 in 16..235, not rounded: Y of ITU-R BT.601
    as MATLAB's rgb2ycbcr has it, by which articles on upscaling measure. Grey (1, H, W) stays as
    it is."""
    pixels = image.double()
    if pixels.shape[-3] == 1:
        return pixels
    weights = pixels.new_tensor([65.481, 128.553, 24.966])[:, None, None] / 255
    return 16 + (pixels * weights).sum(-3, keepdim=True)


def bicubic(image: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) -> (..., height, width), as MATLAB's imresize does it: the cubic kernel with
    a = -0.5 (Keys, Cubic Convolution Interpolation for Digital Image Processing, 1981), widened
    where the image gets smaller, and the image mirrored at its edges.

    A float tensor keeps its type, and its gradient; of whole numbers float64 is made. Not rounded
    and not clamped: the kernel overshoots.
    """
    pixels = image if image.is_floating_point() else image.double()
    for axis, size in ((-2, height), (-1, width)):
        pixels = _resize(pixels, axis, size)
    return pixels


def _pair(image: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != other.shape or image.ndim < 3 or not image.numel():
        raise TesseraError(
            f"images of shape {tuple(image.shape)} and {tuple(other.shape)} can't be compared",
            hint="give two of one shape (C, H, W)",
        )
    return image.double(), other.double()


def _blur(images: Tensor, axis: int) -> Tensor:
    """Gaussian means along an axis, where the window lies inside."""
    side = min(WINDOW, images.shape[axis])
    places = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    weights = torch.exp(-0.5 * (places / SIGMA) ** 2)
    inside = images.shape[axis] - side + 1
    blurred = images.new_zeros(())
    for start, weight in enumerate((weights / weights.sum()).tolist()):
        blurred = blurred + images.narrow(axis, start, inside) * weight
    return blurred


def _resize(pixels: Tensor, axis: int, size: int) -> Tensor:
    given = pixels.shape[axis]
    if given == size:
        return pixels
    near, weights = _contributions(given, size)
    weights = weights.to(pixels)
    near = near.to(pixels.device)
    shape = [1] * pixels.ndim
    shape[axis] = size
    resized = torch.zeros((), dtype=pixels.dtype, device=pixels.device)
    for place, weight in zip(near.T, weights.T):
        resized = resized + pixels.index_select(axis, place) * weight.reshape(shape)
    return resized


def _contributions(given: int, size: int) -> tuple[Tensor, Tensor]:
    """Which pixels of an axis make up each new one, int64 (size, taps), and how much of each, float64
    (size, taps)."""
    scale = size / given
    widened = max(1.0, 1 / scale)
    taps = math.ceil(_SUPPORT * widened) + 2
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / scale - 0.5
    first = (centre - _SUPPORT * widened / 2).floor().long()
    near = first[:, None] + torch.arange(taps)
    weights = _cubic((centre[:, None] - near) / widened)
    weights = weights / weights.sum(1, keepdim=True)
    used = weights.any(0)
    near = near.remainder(2 * given)
    mirrored = torch.where(near < given, near, 2 * given - 1 - near)
    return mirrored[:, used], weights[:, used]


def _cubic(distance: Tensor) -> Tensor:
    x = distance.abs()
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x <= 2, outer, torch.zeros_like(x)))
