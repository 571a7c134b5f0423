"""Networks that enlarge images: ESPCN, SRResNet, EDSR, and a fast one.

ESPCN (Shi et al., Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel
Convolutional Neural Network, 2016), SRResNet (Ledig et al., Photo-Realistic Single Image
Super-Resolution Using a Generative Adversarial Network, 2017), the EDSR baseline (Lim et al.,
Enhanced Deep Residual Networks for Single Image Super-Resolution, 2017).

    B images, P patches of each, C channels, h height, w width of the small image, S scale, D width

    image (B, C, h, w) -> features (B, D, h, w) -> shuffled (B, C, h*S, w*S), added to the bicubic

All of them work at the size of the small image and create the pixels of the large one at the end,
S*S for each position. Unlike in the papers, a network adds to the bicubic interpolation of its
input (`model.bicubic`): it begins at that quality, and needs minutes instead of hours to exceed it.
It enlarges all colours; the paper's ESPCN enlarges luma alone. The loss is the mean absolute
difference of pixels in 0..1, as in EDSR; the papers of ESPCN and SRResNet use the squared
difference.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.tiles import check_tiles, in_tiles
from models.blocks.transfer import check_choice
from models.core.errors import UsageError
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.fitted import DataFacts, Fitted, length
from models.core.spaces import Choice, LogUniform, Space
from models.metrics import image_quality
from models.tasks.upscaling import SCALES, UPSCALING, UpscalingAugment, to_pixels

Kind = Literal["espcn", "srresnet", "edsr"]
Upsampler = Literal["stages", "direct"]


@dataclass(frozen=True)
class SuperResolutionConfig:
    kind: Kind = "edsr"
    """The architecture."""
    scale: int = 2
    """How many times larger the images become: 2, 3 or 4. The same as `augment.scale`."""
    width: int = 32
    """Channels of the features."""
    blocks: int = 4
    """Residual blocks of srresnet and edsr."""
    residual_scale: float = 1.0
    """Factor of each residual block's output before it is added."""
    norm: bool = False
    """Batch norm in the blocks of srresnet."""
    upsampler: Upsampler = "direct"
    """For srresnet and edsr: "stages" enlarges the features and ends with a convolution at the full
    size, as in the papers; "direct" creates the pixels at once, as ESPCN does, much faster."""
    bicubic: bool = True
    """Add the output to the bicubic interpolation of the input."""
    tile: int = 256
    """An image with a side longer than this, before enlarging, is predicted in tiles of that
    side."""
    overlap: int = 48
    """Pixels by which neighbouring tiles overlap, before enlarging."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_choice("scale", self.scale, SCALES)
        check_choice("upsampler", self.upsampler, get_args(Upsampler))
        if self.width < 2 or self.blocks < 1:
            raise UsageError(
                f"model.width = {self.width}, model.blocks = {self.blocks}",
                hint="give a width of 2 or more and at least one block",
            )
        if not 0 < self.residual_scale <= 1:
            raise UsageError(
                f"model.residual_scale = {self.residual_scale}", hint="give more than 0, at most 1"
            )
        check_tiles(self.tile, self.overlap)


class Net(nn.Module):
    """Normalised (B, C, h, w) -> (B, C, h*S, w*S), nominally in 0..1, not clamped."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: SuperResolutionConfig, data: DataSpec) -> None:
        super().__init__()
        self.config = config
        for name in ("mean", "std"):
            values = torch.tensor(getattr(data, name))[:, None, None]
            self.register_buffer(name, values, persistent=False)
        self.body = (_espcn if config.kind == "espcn" else _residual)(config, data.channels)
        if config.bicubic:
            last = [m for m in self.body.modules() if isinstance(m, nn.Conv2d)][-1]
            with torch.no_grad():  # begin close to bicubic interpolation
                last.weight *= 0.01
                cast(Tensor, last.bias).zero_()

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.body(image).float()
        if not self.config.bicubic:
            return output * self.std + self.mean
        scale = self.config.scale
        pixels = image.float() * self.std + self.mean
        height, width = pixels.shape[-2] * scale, pixels.shape[-1] * scale
        return image_quality.bicubic(pixels, height, width) + output


def _espcn(config: SuperResolutionConfig, channels: int) -> nn.Module:
    return nn.Sequential(
        _convolution(channels, config.width, 5),
        nn.Tanh(),
        _convolution(config.width, config.width // 2),
        nn.Tanh(),
        _convolution(config.width // 2, channels * config.scale**2),
        nn.PixelShuffle(config.scale),
    )


def _residual(config: SuperResolutionConfig, channels: int) -> nn.Module:
    width, srresnet = config.width, config.kind == "srresnet"
    outer = 9 if srresnet else 3
    blocks = [_Add(_block(config), config.residual_scale) for _ in range(config.blocks)]
    inner = nn.Sequential(*blocks, _convolution(width, width), *_norm(config))
    first: list[nn.Module] = [_convolution(channels, width, outer)]
    if srresnet:
        first.append(nn.PReLU())
    last: list[nn.Module] = []
    if config.upsampler == "direct":
        last = [
            _convolution(width, channels * config.scale**2, 3),
            nn.PixelShuffle(config.scale),
        ]
    else:
        for factor in (2, 2) if config.scale == 4 else (config.scale,):
            last += [_convolution(width, width * factor**2), nn.PixelShuffle(factor)]
            if srresnet:
                last.append(nn.PReLU())
        last.append(_convolution(width, channels, outer))
    return nn.Sequential(*first, _Add(inner), *last)


def _block(config: SuperResolutionConfig) -> nn.Sequential:
    width = config.width
    activation = nn.PReLU() if config.kind == "srresnet" else nn.ReLU()
    return nn.Sequential(
        _convolution(width, width),
        *_norm(config),
        activation,
        _convolution(width, width),
        *_norm(config),
    )


def _norm(config: SuperResolutionConfig) -> list[nn.Module]:
    return [nn.BatchNorm2d(config.width)] if config.norm and config.kind == "srresnet" else []


def _convolution(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


class _Add(nn.Module):
    """A residual connection around `inner`."""

    def __init__(self, inner: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.inner(x)
        return x + (added if self.scale == 1 else added * self.scale)


class SuperResolution(Family[SuperResolutionConfig]):
    """Can't be exported: an exported module takes images of one size, the largest of the training
    set, but the images to enlarge have other sizes."""

    accepts_any_size = True
    task = UPSCALING
    variants = {
        "base": SuperResolutionConfig(),
        "tiny": SuperResolutionConfig(width=8, blocks=1, tile=64, overlap=16),
        "espcn": SuperResolutionConfig(kind="espcn", width=64),
        "srresnet": SuperResolutionConfig(
            kind="srresnet", width=64, blocks=16, norm=True, upsampler="stages"
        ),
        "edsr": SuperResolutionConfig(width=64, blocks=16, upsampler="stages"),
    }
    defaults = {
        "data.fit": "pad",
        "optim.model.kind": "adam",
        "optim.model.lr": 2e-3,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.02,
        "train.batch_size": 4,
    }
    variant_defaults = {
        "tiny": {"augment.patch": 24, "augment.patches": 2},
        "srresnet": {"optim.model.lr": 1e-4, "augment.patch": 96},
        "edsr": {"optim.model.lr": 1e-4, "augment.patch": 96},
    }

    def fitted_defaults(
        self,
        config: SuperResolutionConfig,
        facts: DataFacts,
        settings: Mapping[str, Any],
        kept: Container[str],
    ) -> Iterable[Fitted]:
        return length(facts, settings, ("train.batch_size",), steps=1500)

    def build(self, config: SuperResolutionConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def check(self, config: SuperResolutionConfig, augment: UpscalingAugment) -> None:
        if config.scale != augment.scale:
            raise UsageError(
                f"model.scale = {config.scale}, but augment.scale = {augment.scale}: the "
                "network must enlarge by the factor by which the images are reduced",
                hint="set both to the same: 2, 3 or 4",
            )

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """Mean absolute difference of pixels in 0..1."""
        image, high = batch["image"], batch["high"]
        if image.ndim == 5:
            image, high = image.flatten(0, 1), high.flatten(0, 1)
        output = module(image)
        if output.shape != high.shape:
            raise UsageError(
                f"the network's images have {tuple(output.shape[-2:])} pixels, the targets "
                f"{tuple(high.shape[-2:])}",
                hint="set model.scale and augment.scale to the same value",
            )
        return {"loss": F.l1_loss(output, high)}

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        """One image at a time, because each has its own size."""
        net = cast(Net, module)
        config = net.config
        predictions = []
        for image, (height, width) in zip(batch["image"], batch["extent"].tolist()):
            seen = image[None, :, :height, :width]
            large = in_tiles(
                seen, net, tile=config.tile, overlap=config.overlap, scale=config.scale
            )
            low = seen * net.std + net.mean
            predictions.append({"image": to_pixels(large[0]).cpu(), "low": to_pixels(low[0]).cpu()})
        return predictions

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-4, 3e-3),
            "model.width": Choice((16, 32, 64)),
            "model.blocks": Choice((2, 4, 8)),
            "augment.patches": Choice((2, 4, 8)),
        }


FAMILY = SuperResolution()
