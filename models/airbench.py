"""A small network that learns fast: its source tells of 94 % on CIFAR-10 after ten epochs.

Source: Jordan, "94 % on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024 (arXiv:2404.00498; the code,
KellerJordan/cifar10-airbench, is MIT). Written anew here; what makes it fast is from there:

- a fixed first layer that whitens patches of 2x2 pixels. There its filters are computed of the
  training images. Here they are the mean and the differences of the pixels, of brightness and of two
  opposed colours, each brought to unit variance: what the principal components of natural images
  are, whichever images they are. So nothing has to be seen before the first step.
- further convolutions begin as the identity
- norms without a scale, and biases that learn 64 times as fast as the weights
- answers are the mean over the image, its mirror image, and both shifted by a pixel

    B images, C channels, H height, W width, K classes, F filters of the first layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.classifier import Classifier
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, LogUniform, Space, Uniform

BIAS_SPEED = 64
OUTPUT_SCALE = 1 / 9
"""Of the logits, as in the source: it keeps the softmax from being sure too early."""


@dataclass(frozen=True)
class AirbenchConfig:
    """`widths`: channels of each stage, which halves the size. `convs`: convolutions in a stage.
    `mirror`: answer with the mean over the image and its mirror image; `shift`: and over both,
    shifted by so many pixels to two sides, 0 for none."""

    widths: tuple[int, ...] = (64, 256, 256)
    convs: int = 2
    mirror: bool = True
    shift: int = 1

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise UsageError(
                f"model.widths = {list(self.widths)}", hint="give a list like [64, 256]"
            )
        if self.convs < 1 or self.shift < 0:
            raise UsageError("model.convs is at least 1, model.shift at least 0")


class Net(nn.Module):
    def __init__(self, config: AirbenchConfig, data: DataSpec) -> None:
        super().__init__()
        self._mirror, self._shift = config.mirror, config.shift
        channels, height, width = data.shape
        self.whiten = _Whiten(channels)
        stages: list[nn.Module] = []
        inputs = self.whiten.filters
        for maps in config.widths:
            pool = min(height, width) >= 2
            height, width = (side // 2 if pool else side for side in (height, width))
            stages.append(_stage(inputs, maps, config.convs, pool=pool))
            inputs = maps
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, len(data.classes), bias=False)

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
        maps = self.stages(self.whiten(image))
        logits: Tensor = self.head(maps.amax((2, 3)))
        return logits * OUTPUT_SCALE


class _Whiten(nn.Module):
    """(B, C, H, W) -> (B, F, H, W): parts of 2x2 patches, and their negatives, of unit variance."""

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
        maps: Tensor = F.gelu(self.shift(torch.cat([parts, -parts], 1)))
        return maps


class _Shift(nn.Module):
    """Adds a bias to each channel that learns `BIAS_SPEED` times as fast as a weight would."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor) -> Tensor:
        # Scaling it by s scales its gradient too: a step moves the sum s * s times as far.
        by = BIAS_SPEED**0.5 * self.bias
        # In the maps' own type: what follows would be done in float32 otherwise.
        shifted: Tensor = maps + by.to(maps.dtype)[:, None, None]
        return shifted


def _stage(inputs: int, maps: int, convs: int, *, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for place in range(convs):
        convolution = nn.Conv2d(maps if place else inputs, maps, 3, padding=1, bias=False)
        with torch.no_grad():
            # The first filters hand their input on.
            nn.init.dirac_(convolution.weight[: convolution.in_channels])
        layers.append(convolution)
        if pool and not place:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.BatchNorm2d(maps, affine=False), _Shift(maps), nn.GELU()]
    return nn.Sequential(*layers)


class Airbench(Classifier[AirbenchConfig]):
    variants = {
        "base": AirbenchConfig(),
        "tiny": AirbenchConfig(widths=(8, 16)),
        "large": AirbenchConfig(widths=(128, 384, 384)),
    }
    defaults = {
        # The source's 11.5 a thousand images with a summed loss, as the rate for a mean over 256.
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
