"""Shows which parts of an image a classifier's prediction depends on.

In: a network, transformed images, and a class for each. Out: a map per image, 1 where it matters
most. It is Grad-CAM (Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization, 2017) if the network ends in feature maps. These are coarse: 7x7 is
usual, 2x2 possible. A network that ends in a sequence, of patches or of rows, has none; there it is
the gradient of the image itself, slightly smoothed (Simonyan et al., Deep Inside Convolutional
Networks, 2013). A map shows what the prediction depends on near this image, not whether it is
right.
Must not know who built the network.

    B images, C channels, H height, W width, K classes
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.evaluation.gradients import frozen

Kind = Literal["grad-cam", "input gradient"]


class Saliency(NamedTuple):
    """`maps` (B, H, W) are floats in 0..1 on the network's device, all 0 if no part of an image
    supports the class. `kind` is the method."""

    maps: Tensor
    kind: Kind


def grad_cam(module: nn.Module, images: Tensor, classes: Tensor) -> Saliency | None:
    """Computes the maps of images (B, C, H, W) for classes (B,). Returns None for a network whose
    output isn't logits (B, K). The network is left unchanged."""
    recorder = _LastFeatureMaps(images.shape[-2], images.shape[-1])
    hooks = [part.register_forward_hook(recorder) for part in module.modules()]
    try:
        with frozen(module):
            inputs = images.detach().clone().requires_grad_()
            logits = module(inputs)
            if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.requires_grad:
                return None
            score = logits.float().gather(1, classes.to(logits.device)[:, None]).sum()
            maps = inputs if recorder.maps is None else recorder.maps
            # Feature maps of a branch that the output doesn't depend on have no gradient.
            slope, of_maps = torch.autograd.grad(score, (inputs, maps), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    if maps is inputs or of_maps is None:
        return Saliency(_scaled(_smooth(slope.float().abs().amax(1))), "input gradient")
    weights = of_maps.float().mean((2, 3), keepdim=True)
    heat = (weights * maps.detach().float()).sum(1, keepdim=True).relu()
    heat = F.interpolate(heat, images.shape[-2:], mode="bilinear", align_corners=False)
    return Saliency(_scaled(heat[:, 0]), "grad-cam")


class _LastFeatureMaps:
    """A forward hook that keeps the last feature maps (B, C, h, w) larger than 1x1. A sequence that
    follows discards them: the output of a transformer has no maps, and its patches are too far from
    the output."""

    def __init__(self, height: int, width: int) -> None:
        self._size = (height, width)
        self.maps: Tensor | None = None

    def __call__(self, part: nn.Module, given: Any, made: Any) -> None:
        output = made[0] if isinstance(made, tuple) and made else made
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        if output.ndim == 4 and self._has_its_shape(output):
            if output.shape[2] * output.shape[3] > 1:
                self.maps = output
        elif output.ndim > 2 and output.shape[1:-1].numel() > 1:
            self.maps = None

    def _has_its_shape(self, maps: Tensor) -> bool:
        """Whether the last two axes can be height and width. With channels last they can't: their
        ratio would be far from the image's."""
        height, width = maps.shape[2:]
        # Within half a cell, because of padding and strides.
        low, high = (height - 1) / (width + 1), (height + 1) / max(width - 1, 0.5)
        return low <= self._size[0] / self._size[1] <= high


def _smooth(maps: Tensor) -> Tensor:
    """(B, H, W), smoothed with a box of 3x3, or larger in large images."""
    side = 2 * max(1, min(maps.shape[-2:]) // 32) + 1
    around = F.avg_pool2d(maps[:, None], side, 1, side // 2, count_include_pad=False)
    return around[:, 0]


def _scaled(maps: Tensor) -> Tensor:
    most = maps.amax((1, 2), keepdim=True)
    return maps / torch.where(most > 0, most, 1)
