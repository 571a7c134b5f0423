"""YOLO: a one-stage detector that finds the objects of an image on several scales at once.

    B images, C channels, H height, W width, K classes, L scales, A points of all scales

    image (B, C, H, W) -> stages of stride 2, 4, 8 … -> the last L feature maps -> a path from
    coarse to fine and back, so that each scale sees the others -> at every point: P(object), its
    classes, its distances to the four sides

Written from the papers: one pass over a grid, and the score P(object) · P(class | object) (Redmon
et al., 2016: https://arxiv.org/abs/1506.02640); feature maps of several scales (YOLOv3, 2018:
https://arxiv.org/abs/1804.02767); blocks that only half of the channels go through (Wang et al.,
CSPNet, 2020: https://arxiv.org/abs/1911.11929); the path in both directions (Liu et al., PANet,
2018: https://arxiv.org/abs/1803.01534); no anchors, and separate heads for class and box (Ge et
al., YOLOX, 2021: https://arxiv.org/abs/2107.08430). Assignment and losses are in
`blocks/anchor_free.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import anchor_free
from models.blocks.anchor_free import Grid, Outputs, Truths, Weights
from models.core.boxes import areas
from models.core.errors import UsageError
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.fitted import DataFacts, Fitted, flip, frame, length, light
from models.core.spaces import Choice, LogUniform, Space, Uniform
from models.tasks.detection import DETECTION

RARE = 0.01
"""P(object) of a new network: nearly no point has an object (Lin et al., Focal Loss, 2017)."""
CANDIDATES = 1000
"""At most so many boxes of an image, those with the highest scores, go into the NMS."""

LONGEST_SIDE, STEPS = 640, 2000
"""Defaults that fit the data: the longest side of the input in pixels, and the steps that a
training needs."""


@dataclass(frozen=True)
class YoloConfig:
    channels: tuple[int, ...] = (16, 32, 64, 128, 192)
    """Channels of the stages, whose strides are 2, 4, 8 …"""
    depth: int = 1
    """Blocks of each stage."""
    scales: int = 3
    """How many of the last stages predict objects: of five stages three predict at strides 8, 16
    and 32."""
    head_channels: int = 64
    """Channels of the heads."""
    head_depth: int = 1
    """Convolutions of each head."""
    reg_max: int = 16
    """Bins of a distance: a side is at most `reg_max` - 1 strides away from its point."""
    topk: int = 10
    """At most so many points are assigned to an object in training."""
    nms_iou: float = 0.6
    """Of two boxes of one class with a higher IoU, the one with the lower score is dropped."""
    conf_threshold: float = 0.01
    """Objects with a lower score are dropped."""
    max_detections: int = 100
    """At most so many objects of an image, those with the highest scores."""
    object_weight: float = 1.0
    """Weight of the loss of P(object)."""
    class_weight: float = 0.5
    """Weight of the classification loss."""
    box_weight: float = 2.0
    """Weight of the CIoU loss of the boxes."""
    distance_weight: float = 0.5
    """Weight of the distribution focal loss of the distances."""

    def __post_init__(self) -> None:
        if len(self.channels) < 2 or min(self.channels) < 2:
            raise UsageError(
                f"model.channels = {list(self.channels)}", hint="give a list like [16, 32, 64, 128]"
            )
        if not 1 <= self.scales < len(self.channels):
            raise UsageError(
                f"model.scales = {self.scales} of {len(self.channels)} stages",
                hint=f"give 1 to {len(self.channels) - 1}",
            )
        for name in ("depth", "head_channels", "head_depth", "topk", "max_detections"):
            if getattr(self, name) < 1:
                raise UsageError(f"model.{name} = {getattr(self, name)}", hint="give 1 or more")
        if self.reg_max < 2:
            raise UsageError(f"model.reg_max = {self.reg_max}", hint="give 2 or more, like 16")
        for name in ("nms_iou", "conf_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"model.{name} = {getattr(self, name)}", hint="give 0 to 1")
        for name in ("object_weight", "class_weight", "box_weight", "distance_weight"):
            if getattr(self, name) <= 0:
                raise UsageError(f"model.{name} = {getattr(self, name)}", hint="give more than 0")

    @property
    def strides(self) -> tuple[int, ...]:
        stages = len(self.channels)
        return tuple(2**n for n in range(stages - self.scales + 1, stages + 1))


class Net(nn.Module):
    """Called with truths it returns losses, otherwise `Outputs` and the `Grid` of its points. The
    losses are computed in `forward` because DistributedDataParallel needs to see them."""

    def __init__(self, config: YoloConfig, data: DataSpec) -> None:
        super().__init__()
        self.config = config
        scales, channels = config.scales, [data.channels, *config.channels]
        self.stages = nn.ModuleList(
            _stage(before, after, config.depth if i else 0)
            for i, (before, after) in enumerate(itertools.pairwise(channels))
        )
        channels = channels[-scales:]
        self.pool = _Pyramid(channels[-1])
        self.coarse = nn.ModuleList(
            _Block(fine + far, fine, config.depth, residual=False)
            for fine, far in itertools.pairwise(channels)
        )
        self.halve = nn.ModuleList(_convolution(fine, fine, 3, 2) for fine in channels[:-1])
        self.fine = nn.ModuleList(
            _Block(fine + far, far, config.depth, residual=False)
            for fine, far in itertools.pairwise(channels)
        )
        self.heads = nn.ModuleList(_Head(width, config, data) for width in channels)

    def forward(self, image: Tensor, truth: Truths | None = None) -> Losses | tuple[Outputs, Grid]:
        outputs, grid = self._outputs(image)
        if truth is None:
            return outputs, grid
        config = self.config
        weights = Weights(
            config.object_weight, config.class_weight, config.box_weight, config.distance_weight
        )
        with torch.autocast(image.device.type, enabled=False):
            return anchor_free.losses(outputs, grid, truth, config.topk, weights)

    def _outputs(self, image: Tensor) -> tuple[Outputs, Grid]:
        feature_maps: list[Tensor] = []
        x = self._pad(image)
        for stage in self.stages:
            x = stage(x)
            feature_maps.append(x)
        feature_maps = feature_maps[-self.config.scales :]
        feature_maps[-1] = self.pool(feature_maps[-1])
        for i in reversed(range(len(feature_maps) - 1)):
            larger = F.interpolate(feature_maps[i + 1], scale_factor=2.0)
            feature_maps[i] = self.coarse[i](torch.cat([feature_maps[i], larger], 1))
        for i, (halve, block) in enumerate(zip(self.halve, self.fine)):
            smaller = halve(feature_maps[i])
            feature_maps[i + 1] = block(torch.cat([smaller, feature_maps[i + 1]], 1))
        by_scale = [head(x) for head, x in zip(self.heads, feature_maps)]
        outputs = Outputs(*(torch.cat(parts, 1) for parts in zip(*by_scale)))
        shapes = [(x.shape[2], x.shape[3]) for x in feature_maps]
        return outputs, anchor_free.grid(shapes, self.config.strides, image)

    def _pad(self, image: Tensor) -> Tensor:
        """Pads with zeros on the right and below until the coarsest stride divides both sides. At
        least two cells, so that a batch norm has several values even for a single image."""
        stride = self.config.strides[-1]
        height, width = image.shape[-2:]
        right, below = -width % stride, -height % stride
        if max(height, width) <= stride:
            right += stride
        return F.pad(image, (0, right, 0, below)) if right or below else image


class _Head(nn.Module):
    """Class and box have convolutions of their own. P(object), which is the expected IoU, is
    computed from those of the box."""

    def __init__(self, in_channels: int, config: YoloConfig, data: DataSpec) -> None:
        super().__init__()
        self.bins, channels = config.reg_max, config.head_channels
        pairs = list(itertools.pairwise([in_channels, *[channels] * config.head_depth]))
        self.what = nn.Sequential(*(_convolution(before, after, 3) for before, after in pairs))
        self.where = nn.Sequential(*(_convolution(before, after, 3) for before, after in pairs))
        self.classes = nn.Conv2d(channels, max(1, len(data.classes)), 1)
        self.object = nn.Conv2d(channels, 1, 1)
        self.distances = nn.Conv2d(channels, 4 * config.reg_max, 1)
        for layer in (self.classes, self.object, self.distances):
            nn.init.normal_(layer.weight, std=0.01)
        self.object.bias = nn.Parameter(torch.full((1,), math.log(RARE / (1 - RARE))))
        if data.counts:
            counts = torch.tensor(data.counts).double() + 1
            self.classes.bias = nn.Parameter((counts / counts.sum()).log().float())
        # Farther bins begin less likely: boxes of a new network are about four strides wide.
        falling = -0.5 * torch.arange(config.reg_max)
        self.distances.bias = nn.Parameter(falling.repeat(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        what, where = self.what(x), self.where(x)
        classes = self.classes(what).flatten(2).transpose(1, 2)
        objects = self.object(where).flatten(1)
        distances = self.distances(where).flatten(2).transpose(1, 2)
        return objects, classes, distances.unflatten(2, (4, self.bins))


class _Block(nn.Module):
    """Half of the channels go through `depth` bottlenecks, the other half past them."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, *, residual: bool = True
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.around = _convolution(in_channels, half, 1)
        self.enter = _convolution(in_channels, half, 1)
        self.inner = nn.Sequential(*(_Bottleneck(half, residual=residual) for _ in range(depth)))
        self.leave = _convolution(2 * half, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.inner(self.enter(x)), self.around(x)], 1)
        out: Tensor = self.leave(both)
        return out


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, *, residual: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            _convolution(channels, channels, 1), _convolution(channels, channels, 3)
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return x + out if self.residual else out


class _Pyramid(nn.Module):
    """Maxima over growing neighbourhoods, concatenated (He et al., Spatial Pyramid Pooling,
    2014: https://arxiv.org/abs/1406.4729)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.enter = _convolution(channels, half, 1)
        self.leave = _convolution(4 * half, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        views = [self.enter(x)]
        for _ in range(3):
            views.append(F.max_pool2d(views[-1], 5, 1, 2))
        out: Tensor = self.leave(torch.cat(views, 1))
        return out


def _stage(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    """A convolution that halves the size, then blocks."""
    first = _convolution(in_channels, channels, 3, 2)
    blocks = [_Block(channels, channels, depth)] if depth else []
    return nn.Sequential(first, *blocks)


def _convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(inplace=True),
    )


class Yolo(Family[YoloConfig]):
    task = DETECTION
    variants = {
        "base": YoloConfig(),
        "nano": YoloConfig(),
        "small": YoloConfig(
            channels=(32, 64, 128, 256, 512), depth=2, head_channels=128, head_depth=2
        ),
        "tiny": YoloConfig(channels=(8, 8, 16, 16), head_channels=16, reg_max=8, topk=60),
    }
    defaults = {
        "optim.model.kind": "adamw",
        "optim.model.lr": 2e-3,
        "optim.model.weight_decay": 0.02,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.05,
        "train.batch_size": 8,
        "train.epochs": 40,
        "train.ema": 0.99,
        "train.clip_norm": 10.0,
        "augment.flip": True,
        "augment.zoom": 0.3,
        "augment.shift": 0.1,
        "augment.mosaic": 0.3,
    }

    def fitted_defaults(
        self,
        config: YoloConfig,
        facts: DataFacts,
        settings: Mapping[str, Any],
        kept: Container[str],
    ) -> Iterable[Fitted]:
        yield from frame(facts, LONGEST_SIDE)
        yield from flip(facts)
        yield from light(facts, brightness=0.2, contrast=0.2, colour=0.1)
        yield from length(facts, settings, kept, steps=STEPS)

    def build(self, config: YoloConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        truth = anchor_free.truths(batch["boxes"], batch["labels"], batch["crowd"])
        losses: Losses = module(batch["image"], truth)
        return losses

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        outputs, grid = module(batch["image"])
        outputs = Outputs(*(logits.float() for logits in outputs))
        boxes, scores = (
            anchor_free.boxes_of(outputs.distances, grid),
            anchor_free.scores_of(outputs),
        )
        edges = batch["extent"].flip(1).repeat(1, 2).to(boxes)[:, None]
        boxes = boxes.clamp(min=0).minimum(edges)
        config: YoloConfig = module.config  # type: ignore[assignment]
        return [_best(config, *one) for one in zip(boxes, scores)]

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(3e-4, 1e-2),
            "optim.model.weight_decay": LogUniform(1e-4, 1e-1),
            "train.batch_size": Choice((8, 16, 32)),
            "augment.mosaic": Uniform(0.0, 1.0),
            "augment.zoom": Uniform(0.0, 1.0),
            "model.topk": Choice((5, 10, 15)),
        }


def _best(config: YoloConfig, boxes: Tensor, scores: Tensor) -> Prediction:
    """The boxes (A, 4) with scores (A, K) that are left after non-maximum suppression."""
    from torchvision.ops import batched_nms

    score, index = scores.flatten().topk(min(CANDIDATES, scores.numel()))
    point, label = index // scores.shape[1], index % scores.shape[1]
    box = boxes[point]
    kept = (score >= config.conf_threshold) & (areas(box) > 0)
    box, score, label = box[kept], score[kept], label[kept]
    best = batched_nms(box, score, label, config.nms_iou)[: config.max_detections]
    return {
        "boxes": box[best].cpu(),
        "scores": score[best].cpu(),
        "labels": label[best].cpu(),
    }


FAMILY = Yolo()
