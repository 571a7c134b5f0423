"""A small network that learns fast: its paper reports 94 % on CIFAR-10 after ten epochs.

Jordan, "94 % on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024 (arXiv:2404.00498; the code,
KellerJordan/cifar10-airbench, is MIT). Written anew here; what makes it fast is the paper's:

- a fixed first layer that whitens patches of 2x2 pixels. The paper computes its filters from the
  training images. Here they are the mean and the differences of the pixels, in brightness and in
  two opposed colours, each scaled to unit variance: these are the principal components of natural
  images in general, so no image has to be seen before the first step.
- further convolutions begin as the identity
- norms without a scale, and biases that learn 64 times as fast as the weights
- predictions are the mean over the image, its mirror image, and both shifted by a pixel

    B images, C channels, H height, W width, K classes, F filters of the first layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.classifier import Classifier
from models.blocks.transfer import check_channels
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, LogUniform, Space, Uniform

BIAS_SPEED = 64
OUTPUT_SCALE = 1 / 9
"""Factor of the logits, as in the paper: it keeps the softmax from saturating early."""


@dataclass(frozen=True)
class AirbenchConfig:
    channels: tuple[int, ...] = (64, 256, 256)
    """Channels of each stage. Every stage halves the size."""
    convs: int = 2
    """Convolutions in each stage."""
    mirror: bool = True
    """Predict with the mean over the image and its mirror image."""
    shift: int = 1
    """Predict also with the images shifted by so many pixels to two corners; 0 for none."""

    def __post_init__(self) -> None:
        check_channels("channels", self.channels, example="[64, 256]")
        if self.convs < 1 or self.shift < 0:
            raise UsageError("model.convs is at least 1, model.shift at least 0")


class Net(nn.Module):
    def __init__(self, config: AirbenchConfig, data: DataSpec) -> None:
        super().__init__()
        self._mirror, self._shift = config.mirror, config.shift
        channels, height, width = data.shape
        self.whiten = _Whiten(channels)
        stages: list[nn.Module] = []
        in_channels = self.whiten.filters
        for out_channels in config.channels:
            pool = min(height, width) >= 2
            height, width = (side // 2 if pool else side for side in (height, width))
            stages.append(_stage(in_channels, out_channels, config.convs, pool=pool))
            in_channels = out_channels
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(in_channels, len(data.classes), bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        if self.training:
            return self._logits(image)
        logits = self._both(image)
        if not self._shift:
            return logits
        by = self._shift
        padded = F.pad(image, (by, by, by, by), mode="replicate")
        height, width = image.shape[-2:]
        corner = padded[..., :height, :width]
        opposite = padded[..., 2 * by : 2 * by + height, 2 * by : 2 * by + width]
        return logits / 2 + (self._both(corner) + self._both(opposite)) / 4

    def _both(self, image: Tensor) -> Tensor:
        logits = self._logits(image)
        return (logits + self._logits(image.flip(-1))) / 2 if self._mirror else logits

    def _logits(self, image: Tensor) -> Tensor:
        x = self.stages(self.whiten(image))
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits * OUTPUT_SCALE


class _Whiten(nn.Module):
    """(B, C, H, W) -> (B, F, H, W): components of 2x2 patches, and their negatives, of unit
    variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1.0]]) / 2
        colours = torch.eye(channels)
        if channels == 3:
            colours = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1.0]])
            colours = colours / colours.norm(dim=1, keepdim=True)
        parts = torch.einsum("sp,kc->skcp", signs, colours).reshape(-1, channels, 2, 2)
        self.register_buffer("weight", parts)
        self.norm = nn.BatchNorm2d(len(parts), affine=False)
        self.shift = _Shift(2 * len(parts))
        self.filters = 2 * len(parts)

    def forward(self, image: Tensor) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[assignment]
        parts = F.conv2d(F.pad(image, (0, 1, 0, 1), mode="replicate"), weight)
        parts = self.norm(parts)
        whitened: Tensor = F.gelu(self.shift(torch.cat([parts, -parts], 1)))
        return whitened


class _Shift(nn.Module):
    """Adds a bias to each channel that learns `BIAS_SPEED` times as fast as a weight would."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # Scaling it by s scales its gradient too: a step moves the sum s * s times as far.
        by = BIAS_SPEED**0.5 * self.bias
        # In the type of x: under autocast, float32 would slow down all that follows.
        shifted: Tensor = x + by.to(x.dtype)[:, None, None]
        return shifted


def _stage(in_channels: int, out_channels: int, convs: int, *, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convs):
        before = out_channels if i else in_channels
        convolution = nn.Conv2d(before, out_channels, 3, padding=1, bias=False)
        with torch.no_grad():
            # The first filters pass their input through.
            nn.init.dirac_(convolution.weight[: convolution.in_channels])
        layers.append(convolution)
        if pool and i == 0:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.BatchNorm2d(out_channels, affine=False), _Shift(out_channels), nn.GELU()]
    return nn.Sequential(*layers)


class Airbench(Classifier[AirbenchConfig]):
    variants = {
        "base": AirbenchConfig(),
        "tiny": AirbenchConfig(channels=(8, 16)),
        "large": AirbenchConfig(channels=(128, 384, 384)),
    }
    defaults = {
        # The paper's rate of 11.5 is for a loss summed over 1,024 images.
        "optim.model.kind": "sgd",
        "optim.model.lr": 0.375,
        "optim.model.momentum": 0.85,
        "optim.model.nesterov": True,
        "optim.model.weight_decay": 1.3e-3,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.2,
        "train.batch_size": 256,
        "augment.label_smoothing": 0.2,
    }
    variant_defaults = {"tiny": {"optim.model.lr": 0.1, "train.batch_size": 64}}

    def build(self, config: AirbenchConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-2, 1.0),
            "optim.model.weight_decay": LogUniform(1e-4, 1e-2),
            "train.batch_size": Choice((128, 256, 512)),
            "augment.label_smoothing": Uniform(0.0, 0.3),
            "model.convs": Choice((1, 2, 3)),
        }


FAMILY = Airbench()
