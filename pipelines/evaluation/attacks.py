"""Changes images so that a classifier errs, by less than the eye notices.

In: a network, and transformed images with their labels. Out: images within `epsilon` of these in
each value, and within the range of a pixel, that raise the loss. They aren't rounded to whole pixel
values. FGSM is one step (Goodfellow et al., Explaining and Harnessing Adversarial Examples, 2014),
PGD several from a random start (Madry et al., Towards Deep Learning Models Resistant to Adversarial
Attacks, 2017). Both are untargeted white-box attacks: a network that withstands them may still fall
to stronger ones. Must not know metrics.

    B images, C channels, H height, W width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.core.errors import UsageError, unknown
from models.core.family import Batch, DataSpec, Family
from pipelines.evaluation.gradients import frozen, input_gradient
from pipelines.evaluation.sample_rng import sample_rng

KINDS = ("fgsm", "pgd")
NetworkLoss = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) -> losses (B,), or their sum."""


def fgsm(
    network_loss: NetworkLoss, images: Tensor, epsilon: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """One step of `epsilon`. `images` (B, C, H, W) are normalised, and so are the other tensors,
    which broadcast to them, like (C, 1, 1): `low` and `high` are normalised black and white."""
    moved = images.detach() + epsilon * input_gradient(network_loss, images).sign()
    return _within(moved, images.detach(), epsilon, low, high)


def pgd(
    network_loss: NetworkLoss,
    images: Tensor,
    epsilon: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    steps: int,
    step: Tensor,
    start: Tensor,
) -> Tensor:
    """`steps` steps of size `step` from `start`, (B, C, H, W) in -1..1 in units of `epsilon`. The
    other arguments are those of `fgsm`."""
    images = images.detach()
    moved = _within(images + epsilon * start, images, epsilon, low, high)
    for _ in range(steps):
        moved = moved + step * input_gradient(network_loss, moved).sign()
        moved = _within(moved, images, epsilon, low, high)
    return moved


def attack(
    family: Family[Any],
    module: nn.Module,
    batch: Batch,
    data: DataSpec,
    kind: str,
    epsilon: float,
    *,
    steps: int = 10,
) -> Tensor:
    """Returns the images (B, C, H, W) of a transformed batch with `label`, changed against this
    network, on the same device.

    `epsilon` is a share of a pixel's range, like 8 / 255. In a frame only the image itself changes.
    PGD takes `steps` steps of 2.5 * epsilon / `steps`, as its authors do; its random start depends
    on the samples' numbers. Raises UsageError for a task other than classification.
    """
    if kind not in KINDS:
        raise unknown("attack", kind, KINDS)
    if family.task.name != "classification" or "label" not in batch:
        raise UsageError(
            f"a {family.name} of {family.task.name.replace('_', ' ')} can't be attacked",
            hint="use a classifier, and images with labels",
        )
    if not 0 <= epsilon <= 1 or steps < 1:
        raise UsageError(
            f"epsilon {epsilon} or steps {steps} is not valid",
            hint="use a share like 0.03, and at least 1 step",
        )
    images: Tensor = batch["image"].detach()
    rows = {name: value for name, value in batch.items() if name != "target"}

    def network_loss(changed: Tensor) -> Tensor:
        return family.loss(module, {**rows, "image": changed})["loss"] * len(changed)

    mean, std = (
        torch.tensor(v, device=images.device)[:, None, None] for v in (data.mean, data.std)
    )
    allowed = epsilon / std * _image_mask(images, batch.get("extent"))
    low, high = -mean / std, (1 - mean) / std
    with frozen(module):
        if kind == "fgsm":
            return fgsm(network_loss, images, allowed, low, high)
        starts = [
            sample_rng("pgd", number).uniform(-1, 1, images.shape[1:]).astype(np.float32)
            for number in batch["index"].tolist()
        ]
        start = torch.from_numpy(np.stack(starts)).to(images.device)
        step = allowed * (2.5 / steps)
        return pgd(network_loss, images, allowed, low, high, steps=steps, step=step, start=start)


def _within(moved: Tensor, images: Tensor, epsilon: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clips `moved` to the allowed range."""
    least, most = torch.maximum(images - epsilon, low), torch.minimum(images + epsilon, high)
    # Rounding may put an image itself outside of the range. Where epsilon is 0 it must not change.
    return torch.minimum(torch.maximum(moved, torch.minimum(least, images)), most.maximum(images))


def _image_mask(images: Tensor, extent: Tensor | None) -> Tensor:
    """(B, 1, H, W): 1 in the image, 0 in the frame around it."""
    count, _, height, width = images.shape
    if extent is None:
        return images.new_ones(count, 1, height, width)
    ends = extent.to(images.device)
    rows = torch.arange(height, device=images.device) < ends[:, :1]
    columns = torch.arange(width, device=images.device) < ends[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[:, None].to(images.dtype)
