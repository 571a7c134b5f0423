"""Images as a poor camera, bad weather or a careless archive would give them.

In: uint8 images as a loader gives them. Out: the same, corrupted. Must not know networks, labels, nor
what is done with the images.

    B images, C channels, H height, W width

The kinds are those of Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations, 2019; so are the constants, which their repository
(hendrycks/robustness, Apache-2.0) has for images of 32 pixels (CIFAR-10-C) and of 224 (ImageNet-C).
Strengths 1, 2, 3 are their severities 1, 3, 5. Between the two sizes a constant is interpolated, by
the logarithm of the image's shorter side; beyond them it stays, but widths of blurs, which are in
pixels, grow and shrink with the image. Nothing is moved: who has boxes and masks keeps them. What
differs from theirs:

- `elastic_transform` is left out, because it would move what boxes and masks tell of; `glass_blur`,
  `zoom_blur`, `snow` and `frost` are not here either;
- `motion_blur` lies around each pixel, not on one side of it, which would move the image;
- the disc of `defocus_blur` is as wide as theirs and its smoothing together; both blurs take an image
  to be linear between its pixels, so that less than a pixel of blur is still some;
- `pixelate` weighs pixels with the very area that they share, as images of a few pixels need it;
- `saturation` has their severities 3, 4, 5, which all add colour: 1 and 2 take some away. A grey
  pixel, which has no hue, stays grey;
- a sample's random numbers begin alike at each strength: mostly it is the same noise, only more of
  it, so that strengths can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.core.errors import UsageError, unknown
from pipelines.evaluation import distortions
from pipelines.evaluation.sample_rng import stream

STRENGTHS = (1, 2, 3)
SMALL, LARGE = 32, 224
"""Sides in pixels of the images that the constants are for."""
Constants = tuple[float, ...]


class _Kind(NamedTuple):
    """`make(picture, numbers, zoom, *constants)`. A row of constants for each strength, for small
    images and for large ones; `zoom`: how much larger or smaller an image is than either."""

    make: Callable[..., NDArray[Any]]
    small: tuple[Constants, Constants, Constants]
    large: tuple[Constants, Constants, Constants]


_KINDS = {
    "gaussian_noise": _Kind(
        distortions.gaussian_noise, ((0.04,), (0.08,), (0.10,)), ((0.08,), (0.18,), (0.38,))
    ),
    "shot_noise": _Kind(distortions.shot_noise, ((500,), (100,), (50,)), ((60,), (12,), (3,))),
    "impulse_noise": _Kind(
        distortions.impulse_noise, ((0.01,), (0.03,), (0.07,)), ((0.03,), (0.09,), (0.27,))
    ),
    "defocus_blur": _Kind(
        distortions.defocus_blur,
        ((0.3, 0.4), (0.5, 0.6), (1.5, 0.1)),
        ((3, 0.1), (6, 0.5), (10, 0.5)),
    ),
    "motion_blur": _Kind(
        distortions.motion_blur, ((6, 1), (6, 2), (9, 2.5)), ((10, 3), (15, 8), (20, 15))
    ),
    "brightness": _Kind(
        distortions.brightness, ((0.05,), (0.15,), (0.3,)), ((0.1,), (0.3,), (0.5,))
    ),
    "contrast": _Kind(distortions.contrast, ((0.75,), (0.4,), (0.15,)), ((0.4,), (0.2,), (0.05,))),
    "saturation": _Kind(
        distortions.saturation, ((1.5, 0), (2, 0.1), (2.5, 0.2)), ((2, 0), (5, 0.1), (20, 0.2))
    ),
    "jpeg_compression": _Kind(
        distortions.jpeg_compression, ((80,), (58,), (40,)), ((25,), (15,), (7,))
    ),
    "pixelate": _Kind(distortions.pixelate, ((0.95,), (0.85,), (0.65,)), ((0.6,), (0.4,), (0.25,))),
    "fog": _Kind(
        distortions.fog, ((0.2, 3), (0.75, 2.5), (1.5, 1.75)), ((1.5, 2), (2.5, 1.7), (3, 1.4))
    ),
}
KINDS = tuple(_KINDS)


def kinds_for(channels: int) -> tuple[str, ...]:
    """The corruptions that images of so many channels can have."""
    return tuple(kind for kind in KINDS if channels == 3 or kind != "saturation")


def corrupt(
    images: Tensor,
    kind: str,
    strength: int,
    numbers: Sequence[int],
    extent: Tensor | None = None,
) -> Tensor:
    """uint8 (B, C, H, W) -> the same shape and type on the same device. `numbers`: each sample's in
    its split; with kind and strength they decide what happens to it, wherever it is in whichever
    batch. `extent` (B, 2): only that left upper part is picture; the rest stays as it is. Worked out
    on the CPU, so it is the same for every device. Raises UsageError."""
    _check(images, kind, strength, numbers)
    made = images.cpu().numpy().copy()
    sizes = [list(images.shape[-2:])] * len(made) if extent is None else extent.tolist()
    for image, number, (height, width) in zip(made, numbers, sizes, strict=True):
        if height and width:
            part = image[:, :height, :width]
            picture = part.astype(np.float32) / 255
            zoom, constants = _scaled(_KINDS[kind], strength, min(height, width))
            part[...] = distortions.to_bytes(
                _KINDS[kind].make(picture, stream(kind, number), zoom, *constants)
            )
    return torch.from_numpy(made).to(images.device)


def _check(images: Tensor, kind: str, strength: int, numbers: Sequence[int]) -> None:
    if kind not in KINDS:
        raise unknown("corruption", kind, KINDS)
    if strength not in STRENGTHS:
        raise UsageError(f"strength {strength}", hint=f"give one of {STRENGTHS}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UsageError(
            f"images of {images.dtype} {tuple(images.shape)} can't be corrupted",
            hint="give uint8 (B, C, H, W) of 1 or 3 channels",
        )
    if kind not in kinds_for(images.shape[1]):
        raise UsageError(f"grey images have no {kind}", hint="see kinds_for")
    if len(numbers) != len(images):
        raise UsageError(f"{len(numbers)} numbers for {len(images)} images", hint="give one each")


def _scaled(kind: _Kind, strength: int, side: int) -> tuple[float, Constants]:
    """How much larger than those of the constants an image is, and the constants for it."""
    near = min(max(side, SMALL), LARGE)
    share = float(np.log(near / SMALL) / np.log(LARGE / SMALL))
    pairs = zip(kind.small[strength - 1], kind.large[strength - 1])
    return side / near, tuple(a * (b / a) ** share if a else 0.0 for a, b in pairs)
