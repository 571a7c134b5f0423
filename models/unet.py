"""U-Net: a class for each pixel, from its surroundings and from the image as a whole.

Ronneberger et al., U-Net: Convolutional Networks for Biomedical Image Segmentation, 2015, with
padded convolutions, so that the output is as large as the image. Trained with cross-entropy and the
soft Dice loss of Milletari et al., V-Net, 2016, extended to several classes.

    B images, P patches of one image, C channels, H height, W width, K classes
    D depth, F channels of the first level

    image (B, C, H, W) -> padded to multiples of 2^D
    -> D times down: level i is (B, F * 2^i, H / 2^i, W / 2^i) -> the lowest level, F * 2^D channels
    -> D times up, each concatenated with the level's output on the way down -> logits (B, K, H, W)
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.tiles import check_tiles, in_tiles
from models.blocks.transfer import check_choice, check_shares
from models.core.errors import UsageError
from models.core.export import ExportModule, unwrap
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.fitted import DataFacts, Fitted, flip, frame, length, light
from models.core.spaces import Choice, LogUniform, Space, Uniform
from models.tasks.semantic_segmentation import IGNORED, SEMANTIC_SEGMENTATION

Norm = Literal["batch", "group", "instance", "none"]
Up = Literal["transpose", "bilinear"]
GROUP_CHANNELS = 8
"""Channels of each group of a group norm."""
LONGEST_SIDE, PATCH, STEPS = 1024, 256, 600
"""Defaults that fit the data: the longest side of the input and the side of a training patch, in
pixels, and the steps that a training needs."""


@dataclass(frozen=True)
class UnetConfig:
    depth: int = 4
    """How many times the size is halved."""
    width: int = 32
    """Channels of the first level. Each lower level has twice as many."""
    norm: Norm = "batch"
    """Norm after each convolution."""
    dropout: float = 0.0
    """Dropout rate of whole channels at the lowest level."""
    up: Up = "transpose"
    """How the size is doubled: by a transposed convolution, or by a convolution and bilinear
    interpolation."""
    dice: float = 1.0
    """Weight of the Dice loss. The cross-entropy has weight 1."""
    tile: int = 1024
    """An image with more than `tile` * `tile` pixels is predicted in tiles of that side."""
    overlap: int = 128
    """Pixels by which neighbouring tiles overlap."""

    def __post_init__(self) -> None:
        if self.depth < 1 or self.width < 1:
            raise UsageError(
                f"model.depth = {self.depth}, model.width = {self.width}", hint="give 1 or more"
            )
        check_choice("norm", self.norm, get_args(Norm))
        check_choice("up", self.up, get_args(Up))
        check_shares(self, "dropout")
        if not 0 <= self.dice < math.inf:
            raise UsageError(f"model.dice = {self.dice}", hint="give 0 or more")
        check_tiles(self.tile, self.overlap)


class Net(nn.Module):
    def __init__(self, config: UnetConfig, data: DataSpec) -> None:
        super().__init__()
        self.config = config
        channels = [config.width * 2**level for level in range(config.depth + 1)]
        in_channels = [data.channels, *channels]
        self.down = nn.ModuleList(
            _block(config, before, after) for before, after in zip(in_channels, channels)
        )
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout2d(config.dropout)
        self.up = nn.ModuleList(_up(config, level) for level in channels[:-1])
        self.merge = nn.ModuleList(_block(config, 2 * level, level) for level in channels[:-1])
        self.head = nn.Conv2d(config.width, len(data.classes), 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                # In a transposed convolution of stride 2, each output depends on one input pixel.
                fan = module.in_channels * module.kernel_size[0] ** 2
                fan = module.in_channels if isinstance(module, nn.ConvTranspose2d) else fan
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        height, width = image.shape[-2:]
        x = reflect(image, 2**self.config.depth)
        skips = []
        for block in self.down[:-1]:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.dropout(self.down[-1](x))
        for level in reversed(range(self.config.depth)):
            x = self.up[level](x)
            x = self.merge[level](torch.cat([skips[level], x], 1))
        logits: Tensor = self.head(x)[..., :height, :width]
        return logits


def _block(config: UnetConfig, in_channels: int, channels: int) -> nn.Sequential:
    """Twice a convolution, a norm and a ReLU."""
    layers: list[nn.Module] = []
    for before in (in_channels, channels):
        layers.append(nn.Conv2d(before, channels, 3, padding=1, bias=config.norm == "none"))
        if config.norm == "batch":
            layers.append(nn.BatchNorm2d(channels))
        elif config.norm == "group":
            groups = math.gcd(max(channels // GROUP_CHANNELS, 1), channels)
            layers.append(nn.GroupNorm(groups, channels))
        elif config.norm == "instance":
            layers.append(nn.InstanceNorm2d(channels, affine=True))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _up(config: UnetConfig, channels: int) -> nn.Module:
    """Twice the size, half the channels: (B, 2 * channels, h, w) -> (B, channels, 2h, 2w)."""
    if config.up == "transpose":
        return nn.ConvTranspose2d(2 * channels, channels, 2, 2)
    larger = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    return nn.Sequential(nn.Conv2d(2 * channels, channels, 1), larger)


def reflect(image: Tensor, unit: int) -> Tensor:
    """Pads an image below and on the right with its mirror image, to sides that are multiples of
    `unit`, and at least two of it: a batch norm then has several values at the lowest level."""
    for axis in (-2, -1):
        size = image.shape[axis]
        padded = max(-(-size // unit), 2) * unit
        if padded > size:
            period = max(2 * size - 2, 1)
            index = torch.arange(padded, device=image.device).remainder(period)
            image = image.index_select(axis, torch.minimum(index, (period - index).abs()))
    return image


def losses_of(logits: Tensor, mask: Tensor, weights: Sequence[float], dice: float) -> Losses:
    """Means over the images, from logits (B, K, H, W) and classes uint8 (B, H, W), 255 for none.
    `weights` are those of the K classes in the cross-entropy, or empty.

    The cross-entropy of an image is the mean over its pixels with a class, 0 if there are none. Its
    Dice loss is 1 minus the mean of the soft Dice coefficients of the classes in it.
    """
    known = mask != IGNORED
    pixels = known.flatten(1).sum(1).clamp(min=1)
    truth = mask.long().masked_fill(~known, 0)
    logs = logits.float().log_softmax(1)
    nll = -logs.gather(1, truth[:, None])[:, 0] * known
    if weights:
        nll = nll * torch.tensor(weights, device=nll.device)[truth]
    cross_entropy = nll.flatten(1).sum(1) / pixels

    classes = logits.shape[1]
    share = logs.exp() * known[:, None]
    truth_shares = F.one_hot(truth, classes).movedim(-1, 1) * known[:, None]
    both = (share * truth_shares).flatten(2).sum(2)
    truths = truth_shares.flatten(2).sum(2)
    coefficients = 2 * both / (share.flatten(2).sum(2) + truths).clamp(min=1)
    present = (truths > 0).float()
    overlap = (coefficients * present).sum(1) / present.sum(1).clamp(min=1)
    dice_loss = (1 - overlap) * (present.sum(1) > 0)
    correct = ((logits.argmax(1) == truth) & known).flatten(1).sum(1) / pixels
    return {
        "loss": (cross_entropy + dice * dice_loss).mean(),
        "cross_entropy": cross_entropy.mean(),
        "dice_loss": dice_loss.mean(),
        "pixel_accuracy": correct.mean(),
    }


class Unet(Family[UnetConfig]):
    accepts_any_size = True
    losses = ("cross_entropy",)
    weighs_classes = True
    task = SEMANTIC_SEGMENTATION
    variants = {
        "base": UnetConfig(),
        "tiny": UnetConfig(depth=2, width=8, norm="group"),
        "small": UnetConfig(depth=3, width=16),
        "paper": UnetConfig(width=64, norm="none", dropout=0.5, dice=0.0),
    }
    defaults = {
        "data.fit": "pad",
        "optim.model.kind": "adamw",
        "optim.model.lr": 1e-3,
        "optim.model.weight_decay": 1e-4,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.05,
        "train.batch_size": 8,
        "train.clip_norm": 1.0,
        "augment.flip": True,
    }
    variant_defaults = {
        "paper": {
            "optim.model.kind": "sgd",
            "optim.model.lr": 1e-3,
            "optim.model.momentum": 0.99,
            "optim.model.weight_decay": 0.0,
            "schedule.kind": "constant",
            "schedule.warmup": 0.0,
            "train.batch_size": 1,
            "augment.elastic": 10.0,
        }
    }

    def fitted_defaults(
        self,
        config: UnetConfig,
        facts: DataFacts,
        settings: Mapping[str, Any],
        kept: Container[str],
    ) -> Iterable[Fitted]:
        yield from frame(facts, LONGEST_SIDE)
        shrunk = min(1.0, LONGEST_SIDE / facts.longer_side)
        shorter = int(facts.shorter_side * shrunk)
        if shorter > PATCH:
            patches = min(8, (shorter // PATCH) ** 2 * 2)
            reason = f"an image has room for several patches of {PATCH}x{PATCH} pixels"
            yield Fitted("augment.patch", PATCH, reason)
            yield Fitted("augment.patches", patches, reason)
            batch = max(1, settings["train.batch_size"] // patches)
            yield Fitted("train.batch_size", batch, f"{patches} patches of each image")
            settings = {**settings, "train.batch_size": batch}
        yield from flip(facts)
        yield from light(facts, brightness=0.1, contrast=0.2)
        yield from length(facts, settings, ("train.batch_size",), steps=STEPS)

    def build(self, config: UnetConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """For images (B, C, H, W) with `mask` (B, H, W), or (B, P, C, H, W) with (B, P, H, W)."""
        image, mask = batch["image"], batch["mask"]
        if image.ndim == 5:
            image, mask = image.flatten(0, 1), mask.flatten(0, 1)
        net: Net = unwrap(module)
        weights = self.loss_settings.weights if self.loss_settings else ()
        return losses_of(module(image), mask, weights, net.config.dice)

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        """Predicts each image alone and without its padding, which would change the prediction."""
        predictions = []
        for image, (height, width) in zip(batch["image"], batch["extent"].tolist()):
            shares = self._shares(module, image[None, :, :height, :width])
            confidence, classes = shares[0].max(0)
            mask = classes.to(torch.uint8).cpu()  # CPU-GPU sync point
            predictions.append({"mask": mask, "confidence": float(confidence.mean())})
        return predictions

    def _shares(self, module: nn.Module, image: Tensor) -> Tensor:
        """(1, C, H, W) -> probabilities (1, K, H, W)."""

        def run(images: Tensor) -> Tensor:
            logits: Tensor = module(images)
            return logits.float().softmax(1)

        config: UnetConfig = unwrap(module).config
        if image.shape[-2] * image.shape[-1] <= config.tile**2:
            return run(image)
        return in_tiles(image, run, tile=config.tile, overlap=config.overlap)

    def exportable(self, module: nn.Module, data: DataSpec) -> nn.Module:
        """From uint8 (B, H, W, C) to probabilities (B, H, W, K). Doesn't split large images."""
        return _Probabilities(module, data)

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-4, 1e-2),
            "optim.model.weight_decay": LogUniform(1e-6, 1e-2),
            "train.batch_size": Choice((2, 4, 8)),
            "model.width": Choice((16, 32, 64)),
            "model.dice": Uniform(0.0, 2.0),
            "train.class_weights": Choice(("none", "sqrt", "balanced")),
            "augment.zoom": Uniform(0.0, 0.3),
        }


class _Probabilities(ExportModule):
    def finish(self, output: Any) -> Tensor:
        return super().finish(output).softmax(1).permute(0, 2, 3, 1).contiguous()


FAMILY = Unet()
