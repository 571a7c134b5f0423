"""Similarity of two images: mean squared error, PSNR, SSIM; luma; bicubic resizing.

In: images as float or uint8 tensors. Out: numbers, and images as float64. Everything is computed in
float64 and one image at a time, so results don't depend on the batch or on the network's precision.
Must not know networks or tasks.

    C channels, H height, W width

`peak` is the largest possible value of a pixel: 255, or 1 for pixels scaled to 0..1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.core.errors import TesseraError

MAX_DECIBELS = 100.0
"""The largest PSNR, which is that of equal images: means over images stay finite."""
WINDOW, SIGMA = 11, 1.5
"""SSIM's Gaussian window in pixels, as in the paper."""
_SUPPORT = 4.0
"""Width of the cubic kernel in pixels."""


def mse(image: Tensor, other: Tensor) -> float:
    """Mean squared difference of two images of the same shape."""
    first, second = _pair(image, other)
    return float((first - second).square().mean())


def psnr(image: Tensor, other: Tensor, *, peak: float) -> float:
    """Peak signal-to-noise ratio of two images of the same shape, in dB, at most `MAX_DECIBELS`."""
    return decibels(mse(image, other), peak=peak)


def decibels(error: float, *, peak: float) -> float:
    """The PSNR in dB for a mean squared error, at most `MAX_DECIBELS`."""
    if error <= 0:
        return MAX_DECIBELS
    return min(10 * math.log10(peak * peak / error), MAX_DECIBELS)


def ssim(image: Tensor, other: Tensor, *, peak: float) -> float:
    """Structural similarity of two images (C, H, W), at most 1: Wang et al., Image Quality
    Assessment: From Error Visibility to Structural Similarity, 2004.

    Means, variances and covariance under a Gaussian window of 11 by 11 pixels with a standard
    deviation of 1.5; the mean over the positions where the window is inside the image, and over the
    channels. If the image is smaller than the window, the window is cropped to it.
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
    """RGB (3, H, W) in 0..255 -> (1, H, W) float64 in 16..235, not rounded: Y of ITU-R BT.601 as
    MATLAB's rgb2ycbcr computes it, which papers on upscaling use. Grey (1, H, W) is unchanged."""
    pixels = image.double()
    if pixels.shape[-3] == 1:
        return pixels
    weights = pixels.new_tensor([65.481, 128.553, 24.966])[:, None, None] / 255
    return 16 + (pixels * weights).sum(-3, keepdim=True)


def bicubic(image: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) -> (..., height, width), like MATLAB's imresize: the cubic kernel with a = -0.5
    (Keys, Cubic Convolution Interpolation for Digital Image Processing, 1981), widened for
    reductions, with reflection at the edges.

    Float tensors keep their type and gradient; integers become float64. The result is not rounded
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
            hint="give two of the same shape (C, H, W)",
        )
    return image.double(), other.double()


def _blur(images: Tensor, axis: int) -> Tensor:
    """Gaussian means along an axis, at the positions where the window is inside."""
    side = min(WINDOW, images.shape[axis])
    offsets = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    inside = images.shape[axis] - side + 1
    blurred = images.new_zeros(())
    for start, weight in enumerate((weights / weights.sum()).tolist()):
        blurred = blurred + images.narrow(axis, start, inside) * weight
    return blurred


def _resize(pixels: Tensor, axis: int, size: int) -> Tensor:
    before = pixels.shape[axis]
    if before == size:
        return pixels
    near, weights = _contributions(before, size)
    weights = weights.to(pixels)
    near = near.to(pixels.device)
    shape = [1] * pixels.ndim
    shape[axis] = size
    resized = torch.zeros((), dtype=pixels.dtype, device=pixels.device)
    for index, weight in zip(near.T, weights.T):
        resized = resized + pixels.index_select(axis, index) * weight.reshape(shape)
    return resized


def _contributions(before: int, size: int) -> tuple[Tensor, Tensor]:
    """For each new pixel of an axis, the indices of its source pixels, int64 (size, taps), and
    their weights, float64 (size, taps)."""
    scale = size / before
    widened = max(1.0, 1 / scale)
    taps = math.ceil(_SUPPORT * widened) + 2
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / scale - 0.5
    first = (centre - _SUPPORT * widened / 2).floor().long()
    near = first[:, None] + torch.arange(taps)
    weights = _cubic((centre[:, None] - near) / widened)
    weights = weights / weights.sum(1, keepdim=True)
    used = weights.any(0)
    near = near.remainder(2 * before)
    mirrored = torch.where(near < before, near, 2 * before - 1 - near)
    return mirrored[:, used], weights[:, used]


def _cubic(distance: Tensor) -> Tensor:
    x = distance.abs()
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x <= 2, outer, torch.zeros_like(x)))
