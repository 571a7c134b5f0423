"""Small convolutional networks: one to begin with, and four from well-known papers.

This is the first file to read, and the one to copy for a new family: a config, its variants, the
network, and the object `FAMILY` that ties them together.

    B images, C channels, H height, W width, K classes, D features of one image

    image (B, C, H, W) -> stages, each (B, channels[i], H_i, W_i) -> features (B, D) -> logits (B,
    K)

A stage is a convolution, a 2x2 max pool, a norm and a ReLU, then further convolutions of as many
channels with a residual connection around each. The papers print pool and ReLU the other way round,
which is the same function. They also give sizes for one image size; here sizes follow from the
data:

- an unpadded convolution is padded if the feature map has become smaller than its kernel;
- a pool is left out if the feature map is smaller than 2x2 pixels.

So every variant works on images of any size, and on the papers' image sizes it is the paper's
network (without the softmax that some put before the cross-entropy, which has its own).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.blocks.classifier import Classifier, sgd_defaults, sgd_search_space
from models.blocks.transfer import check_channels, check_shares
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, Space, Uniform


@dataclass(frozen=True)
class CnnConfig:
    channels: tuple[int, ...] = (32, 64, 128)
    """Channels of each stage."""
    convs: int = 2
    """Convolutions in each stage."""
    kernel: int = 3
    """Side of the convolution kernels, odd."""
    pad: bool = True
    """Pad the convolutions, so that they keep the size."""
    pools: int = 3
    """How many stages, from the first, halve the size with a max pool."""
    norm: bool = True
    """Batch norm after each convolution."""
    hidden: int = 0
    """Units of a dense layer before the head; 0 takes the global maximum of each channel
    instead."""
    map_dropout: float = 0.0
    """Dropout rate of whole channels after the last stage."""
    dropout: float = 0.0
    """Dropout rate before the head."""
    mirror: bool = False
    """Predict with the mean over the image and its mirror image. Training doesn't change."""

    def __post_init__(self) -> None:
        check_channels("channels", self.channels, example="[32, 64]")
        if self.convs < 1 or self.pools < 0 or self.hidden < 0:
            raise UsageError("model.convs is at least 1, model.pools and model.hidden at least 0")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"model.kernel = {self.kernel}", hint="give an odd number, like 3")
        check_shares(self, "map_dropout", "dropout")


class Net(nn.Module):
    def __init__(self, config: CnnConfig, data: DataSpec) -> None:
        super().__init__()
        channels, height, width = data.shape
        stages: list[nn.Module] = []
        for stage, out_channels in enumerate(config.channels):
            pad = config.kernel // 2 if config.pad or min(height, width) < config.kernel else 0
            height, width = (side + 2 * pad - config.kernel + 1 for side in (height, width))
            pool = stage < config.pools and min(height, width) >= 2
            height, width = (side // 2 if pool else side for side in (height, width))
            stages.append(_stage(config, channels, out_channels, pad=pad, pool=pool))
            stages.extend(
                _Residual(_convolution(config, out_channels)) for _ in range(config.convs - 1)
            )
            channels = out_channels
        self.stages = nn.Sequential(*stages, nn.Dropout2d(config.map_dropout))
        if config.hidden:
            dense = nn.Linear(channels * height * width, config.hidden)
            self.features = nn.Sequential(nn.Flatten(), dense, nn.ReLU())
        else:
            self.features = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden or channels, len(data.classes))
        self.mirror = config.mirror

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        logits = self._logits(image)
        if self.mirror and not self.training:
            logits = (logits + self._logits(image.flip(-1))) / 2
        return logits

    def _logits(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.features(self.stages(image))))
        return logits


def _stage(
    config: CnnConfig, in_channels: int, out_channels: int, *, pad: int, pool: bool
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, config.kernel, padding=pad, bias=not config.norm)
    ]
    if pool:
        layers.append(nn.MaxPool2d(2))
    if config.norm:
        layers.append(nn.BatchNorm2d(out_channels))
    return nn.Sequential(*layers, nn.ReLU())


def _convolution(config: CnnConfig, channels: int) -> nn.Sequential:
    return _stage(config, channels, channels, pad=config.kernel // 2, pool=False)


class _Residual(nn.Module):
    """A residual connection around `inner`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.inner(x)
        return added


_PAPER = {
    "optim.model.nesterov": False,
    "optim.model.weight_decay": 0.0,
    "schedule.kind": "constant",
    "schedule.warmup": 0.0,
}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lenet-dropout": {"optim.model.lr": 0.01, "optim.model.momentum": 0.5},
    "two-conv": {"optim.model.kind": "adam", "optim.model.lr": 1e-3},
    "keras-style": {"optim.model.kind": "adam", "optim.model.lr": 1e-3},
    "four-conv": {"optim.model.lr": 0.01, "optim.model.momentum": 0.9},
}


class Cnn(Classifier[CnnConfig]):
    variants = {
        "base": CnnConfig(),
        "tiny": CnnConfig(channels=(8, 16), pools=2, convs=1, norm=False),
        # PyTorch's MNIST example of 2017
        "lenet-dropout": CnnConfig(
            channels=(10, 20),
            kernel=5,
            pad=False,
            pools=2,
            convs=1,
            norm=False,
            hidden=50,
            map_dropout=0.5,
            dropout=0.5,
        ),
        "two-conv": CnnConfig(channels=(32, 64), pools=2, convs=1, norm=False, hidden=128),
        # the Keras and TensorFlow tutorials on CIFAR-10
        "keras-style": CnnConfig(
            channels=(32, 64, 64), pad=False, pools=2, convs=1, norm=False, hidden=64
        ),
        "four-conv": CnnConfig(
            channels=(32, 64, 128, 128), pools=4, convs=1, norm=False, hidden=512
        ),
    }
    defaults = sgd_defaults(0.1, warmup=0.2)
    variant_defaults = {
        "tiny": {"optim.model.lr": 0.05},
        **{name: _PAPER | optimizer for name, optimizer in _OPTIMIZERS.items()},
    }

    def build(self, config: CnnConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def search_space(self) -> Mapping[str, Space]:
        return {
            **sgd_search_space(1.0),
            "model.dropout": Uniform(0.0, 0.5),
            "model.convs": Choice((1, 2, 3)),
        }


FAMILY = Cnn()
