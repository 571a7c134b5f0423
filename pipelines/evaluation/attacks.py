"""Images that were changed against a classifier, by less than an eye would notice.

In: a network, and images as it sees them, with their labels. Out: images within `epsilon` of these in
each value, and within what a pixel can be, that raise the loss. Nobody rounds them to whole pixels.
FGSM is one step (Goodfellow et al., Explaining and Harnessing Adversarial Examples, 2014), PGD many
from a random start (Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks,
2017). Both are untargeted, and know the network: who withstands them may yet fall to stronger ones.
Must not know figures.

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
from pipelines.evaluation.gradients import frozen, slope
from pipelines.evaluation.sample_rng import stream

KINDS = ("fgsm", "pgd")
NetworkLoss = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) -> losses (B,), or their sum."""


def fgsm(
    network_loss: NetworkLoss, images: Tensor, epsilon: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """One step of `epsilon`. `images` (B, C, H, W) are normalised; so are the others, which fit them,
    like (C, 1, 1): `low` and `high` are what black and white pixels become."""
    moved = images.detach() + epsilon * slope(network_loss, images).sign()
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
    """`steps` steps, each of the size `step`, from `start`, (B, C, H, W) in -1..1 as shares of
    `epsilon`; the rest is as for `fgsm`."""
    images = images.detach()
    moved = _within(images + epsilon * start, images, epsilon, low, high)
    for _ in range(steps):
        moved = moved + step * slope(network_loss, moved).sign()
        moved = _within(moved, images, epsilon, low, high)
    return moved


def attacked(
    family: Family[Any],
    module: nn.Module,
    batch: Batch,
    data: DataSpec,
    kind: str,
    epsilon: float,
    *,
    steps: int = 10,
) -> Tensor:
    """The images (B, C, H, W) of a transformed batch with `label`, against this network, on the same
    device. `epsilon` is a share of a pixel's range, like 8 / 255; in a frame only what is picture
    changes. PGD takes `steps` steps of 2.5 / `steps` of it, as its authors do, and starts where the
    samples' numbers say. Raises UsageError where nothing is classified."""
    if kind not in KINDS:
        raise unknown("attack", kind, KINDS)
    if family.task.name != "classification" or "label" not in batch:
        raise UsageError(
            f"a {family.name} of {family.task.name.replace('_', ' ')} can't be attacked",
            hint="name a classifier, and images with labels",
        )
    if not 0 <= epsilon <= 1 or steps < 1:
        raise UsageError(
            f"epsilon = {epsilon}, steps = {steps}",
            hint="give a share like 0.03, and 1 step or more",
        )
    images: Tensor = batch["image"].detach()
    rows = {name: value for name, value in batch.items() if name != "target"}

    def network_loss(changed: Tensor) -> Tensor:
        return family.loss(module, {**rows, "image": changed})["loss"] * len(changed)

    mean, std = (
        torch.tensor(v, device=images.device)[:, None, None] for v in (data.mean, data.std)
    )
    allowed = epsilon / std * _picture(images, batch.get("extent"))
    low, high = -mean / std, (1 - mean) / std
    with frozen(module):
        if kind == "fgsm":
            return fgsm(network_loss, images, allowed, low, high)
        drawn = [
            stream("pgd", number).uniform(-1, 1, images.shape[1:]).astype(np.float32)
            for number in batch["index"].tolist()
        ]
        start = torch.from_numpy(np.stack(drawn)).to(images.device)
        step = allowed * (2.5 / steps)
        return pgd(network_loss, images, allowed, low, high, steps=steps, step=step, start=start)


def _within(moved: Tensor, images: Tensor, epsilon: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The nearest to `moved` that is allowed."""
    least, most = torch.maximum(images - epsilon, low), torch.minimum(images + epsilon, high)
    # An image may itself lie beyond the range by a rounding; where nothing may change it doesn't.
    return torch.minimum(torch.maximum(moved, torch.minimum(least, images)), most.maximum(images))


def _picture(images: Tensor, extent: Tensor | None) -> Tensor:
    """(B, 1, H, W): 1 where a frame is picture, else 0."""
    count, _, height, width = images.shape
    if extent is None:
        return images.new_ones(count, 1, height, width)
    ends = extent.to(images.device)
    rows = torch.arange(height, device=images.device) < ends[:, :1]
    columns = torch.arange(width, device=images.device) < ends[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[:, None].to(images.dtype)
