"""Where in an image a classifier saw what it says.

In: a network, images as it sees them, and a class each. Out: a map of each image, 1 where it matters
most. Grad-CAM (Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization, 2017) where the network ends in maps. They are coarse: 7x7 places of an image are
usual, and 2x2 are possible. A network that ends in a sequence, of patches or of rows, has none: there
it is the gradient of the image itself (Simonyan et al., Deep Inside Convolutional Networks, 2013),
smoothed a little. A map says what the answer hangs on near this image, not why it is right. Must not
know who built the network.

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
    """`maps` (B, H, W) float in 0..1, on the network's device; all 0 for an image of which no place
    speaks for the class. `kind` says how they were made."""

    maps: Tensor
    kind: Kind


def grad_cam(module: nn.Module, images: Tensor, classes: Tensor) -> Saliency | None:
    """Of images (B, C, H, W) and classes (B,). None for a network whose answer isn't logits (B, K).
    The network is left as it was."""
    watched = _LastMaps(images.shape[-2], images.shape[-1])
    hooks = [part.register_forward_hook(watched) for part in module.modules()]
    try:
        with frozen(module):
            given = images.detach().clone().requires_grad_()
            logits = module(given)
            if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.requires_grad:
                return None
            score = logits.float().gather(1, classes.to(logits.device)[:, None]).sum()
            maps = given if watched.maps is None else watched.maps
            # Maps of a branch that has no part in the answer have no gradient.
            slope, of_maps = torch.autograd.grad(score, (given, maps), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    if maps is given or of_maps is None:
        return Saliency(_scaled(_smooth(slope.float().abs().amax(1))), "input gradient")
    weights = of_maps.float().mean((2, 3), keepdim=True)
    heat = (weights * maps.detach().float()).sum(1, keepdim=True).relu()
    heat = F.interpolate(heat, images.shape[-2:], mode="bilinear", align_corners=False)
    return Saliency(_scaled(heat[:, 0]), "grad-cam")


class _LastMaps:
    """A forward hook that keeps the last maps (B, C, h, w) of more than one place that a module
    gave. A sequence that comes later takes them away: what a network makes of patches is no map, and
    the patches themselves are too far from its answer."""

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
        """Whether the last two axes may be those of the image. Where channels come last they are
        not: a map would be many times higher than it is wide."""
        height, width = maps.shape[2:]
        # Half a place more or less, as borders and strides have it.
        low, high = (height - 1) / (width + 1), (height + 1) / max(width - 1, 0.5)
        return low <= self._size[0] / self._size[1] <= high


def _smooth(maps: Tensor) -> Tensor:
    """(B, H, W), each place the mean of those around it: three, or more in large images."""
    side = 2 * max(1, min(maps.shape[-2:]) // 32) + 1
    around = F.avg_pool2d(maps[:, None], side, 1, side // 2, count_include_pad=False)
    return around[:, 0]


def _scaled(maps: Tensor) -> Tensor:
    most = maps.amax((1, 2), keepdim=True)
    return maps / torch.where(most > 0, most, 1)
