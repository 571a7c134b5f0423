"""Small convolutional networks: one to begin with, and four from well-known articles.

This is the first file to read, and the one to copy for a new family: a config, its variants, the
network, and the object `FAMILY` that ties them together.

    B images, C channels, H height, W width, K classes, D features of one image

    image (B, C, H, W) -> stages, each (B, widths[i], H_i, W_i) -> features (B, D) -> logits (B, K)

A stage is a convolution, a 2x2 max pool, a norm and a ReLU, then further convolutions of the same
width around which the signal can pass. The articles print pool and ReLU the other way round, which
is the same function. They also print sizes for one image size; here sizes follow from the images:

- an unpadded convolution is padded where the image has become smaller than its kernel;
- a pool is left out where less than 2x2 pixels are there to be pooled.

So every variant works on images of any size, and on the articles' sizes it is the articles' network
(without the softmax that some put before a cross-entropy, which takes it itself).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.blocks.classifier import Classifier
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, LogUniform, Space, Uniform


@dataclass(frozen=True)
class CnnConfig:
    """`widths`: channels of each stage. `convs`: convolutions in a stage. `pad`: keep the size.
    `pools`: so many stages, from the first, halve the size. `norm`: batch norm. `hidden`: width of
    a dense layer before the last, 0 to take each map's maximum instead. `map_dropout`: share of
    whole maps dropped after the last stage; `dropout`: share of features before the last layer.
    `mirror`: answer with the mean over the image and its mirror image; training doesn't change."""

    widths: tuple[int, ...] = (32, 64, 128)
    convs: int = 2
    kernel: int = 3
    pad: bool = True
    pools: int = 3
    norm: bool = True
    hidden: int = 0
    map_dropout: float = 0.0
    dropout: float = 0.0
    mirror: bool = False

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise UsageError(
                f"model.widths = {list(self.widths)}", hint="give a list like [32, 64]"
            )
        if self.convs < 1 or self.pools < 0 or self.hidden < 0:
            raise UsageError("model.convs is at least 1, model.pools and model.hidden at least 0")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"model.kernel = {self.kernel}", hint="give an odd number, like 3")
        if not (0 <= self.map_dropout < 1 and 0 <= self.dropout < 1):
            raise UsageError("model.dropout and model.map_dropout are 0 or more and below 1")


class Net(nn.Module):
    def __init__(self, config: CnnConfig, data: DataSpec) -> None:
        super().__init__()
        channels, height, width = data.shape
        stages: list[nn.Module] = []
        for place, maps in enumerate(config.widths):
            pad = config.kernel // 2 if config.pad or min(height, width) < config.kernel else 0
            height, width = (side + 2 * pad - config.kernel + 1 for side in (height, width))
            pool = place < config.pools and min(height, width) >= 2
            height, width = (side // 2 if pool else side for side in (height, width))
            stages.append(_stage(config, channels, maps, pad=pad, pool=pool))
            stages.extend(_Residual(_convolution(config, maps)) for _ in range(config.convs - 1))
            channels = maps
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


def _stage(config: CnnConfig, channels: int, maps: int, *, pad: int, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(channels, maps, config.kernel, padding=pad, bias=not config.norm)
    ]
    if pool:
        layers.append(nn.MaxPool2d(2))
    if config.norm:
        layers.append(nn.BatchNorm2d(maps))
    return nn.Sequential(*layers, nn.ReLU())


def _convolution(config: CnnConfig, maps: int) -> nn.Sequential:
    return _stage(config, maps, maps, pad=config.kernel // 2, pool=False)


class _Residual(nn.Module):
    """Adds what `inner` makes of the signal to the signal."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, signal: Tensor) -> Tensor:
        added: Tensor = signal + self.inner(signal)
        return added


_ARTICLE = {
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
        "tiny": CnnConfig(widths=(8, 16), pools=2, convs=1, norm=False),
        # PyTorch's MNIST example of 2017
        "lenet-dropout": CnnConfig(
            widths=(10, 20),
            kernel=5,
            pad=False,
            pools=2,
            convs=1,
            norm=False,
            hidden=50,
            map_dropout=0.5,
            dropout=0.5,
        ),
        "two-conv": CnnConfig(widths=(32, 64), pools=2, convs=1, norm=False, hidden=128),
        # the Keras and TensorFlow tutorials on CIFAR-10
        "keras-style": CnnConfig(
            widths=(32, 64, 64), pad=False, pools=2, convs=1, norm=False, hidden=64
        ),
        "four-conv": CnnConfig(widths=(32, 64, 128, 128), pools=4, convs=1, norm=False, hidden=512),
    }
    defaults = {
        "optim.model.kind": "sgd",
        "optim.model.lr": 0.1,
        "optim.model.nesterov": True,
        "optim.model.weight_decay": 5e-4,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.2,
    }
    variant_defaults = {
        "tiny": {"optim.model.lr": 0.05},
        **{name: _ARTICLE | optimizer for name, optimizer in _OPTIMIZERS.items()},
    }

    def build(self, config: CnnConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-3, 1.0),
            "optim.model.weight_decay": LogUniform(1e-5, 1e-2),
            "train.batch_size": Choice((64, 128, 256)),
            "augment.label_smoothing": Uniform(0.0, 0.2),
            "model.dropout": Uniform(0.0, 0.5),
            "model.convs": Choice((1, 2, 3)),
        }


FAMILY = Cnn()
