"""YOLO: one look finds all objects of an image, on several scales at once.

    B images, C channels, H height, W width, K classes, L scales, A points of all scales

    image (B, C, H, W) -> stages of stride 2, 4, 8 … -> the last L maps -> down and up again, so that
    each scale knows of the others -> at every point an object?, its classes, its distances to the
    four sides

Written from the articles: one pass over a grid, and a score that is P(object) · P(class | object)
(Redmon et al., 2016: https://arxiv.org/abs/1506.02640); maps of several scales (YOLOv3, 2018:
https://arxiv.org/abs/1804.02767); blocks that only half of the channels go through (Wang et al.,
CSPNet, 2020: https://arxiv.org/abs/1911.11929); the way down and up (Liu et al., PANet, 2018:
https://arxiv.org/abs/1803.01534); no anchors, and heads of their own for what and where (Ge et al.,
YOLOX, 2021: https://arxiv.org/abs/2107.08430). Who answers for what, and the losses, are in
`core/anchor_free.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import anchor_free
from models.blocks.anchor_free import Grid, Said, Truths, Weights
from models.core.boxes import areas
from models.core.errors import UsageError
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.spaces import Choice, LogUniform, Space, Uniform
from models.tasks.detection import DETECTION

RARE = 0.01
"""P(object) of a new network: nearly no point answers for one (Lin et al., Focal Loss, 2017)."""
CANDIDATES = 1000
"""Of an image so many of the best boxes are compared with each other."""


@dataclass(frozen=True)
class YoloConfig:
    """`widths`: channels of the stages, whose strides are 2, 4, 8 …; the last `scales` of them find
    objects, so four widths and three scales find them at strides 4, 8 and 16. `depth`: blocks of a
    stage. `head`: channels of the heads, `head_depth` their convolutions. `bins`: a side is up to
    `bins` - 1 strides away from its point. `points`: most points that answer for an object.
    `overlap`: of two boxes of a class that overlap more, one is dropped. `least_score`: less certain
    objects are no answers. `objects`: most answers for an image. `*_weight`: of the losses."""

    widths: tuple[int, ...] = (16, 32, 64, 128, 192)
    depth: int = 1
    scales: int = 3
    head: int = 64
    head_depth: int = 1
    bins: int = 16
    points: int = 10
    overlap: float = 0.6
    least_score: float = 0.01
    objects: int = 100
    object_weight: float = 1.0
    class_weight: float = 0.5
    box_weight: float = 2.0
    bin_weight: float = 0.5

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 2:
            raise UsageError(
                f"model.widths = {list(self.widths)}", hint="give a list like [16, 32, 64, 128]"
            )
        if not 1 <= self.scales < len(self.widths):
            raise UsageError(
                f"model.scales = {self.scales} of {len(self.widths)} stages",
                hint=f"give 1 to {len(self.widths) - 1}",
            )
        for name in ("depth", "head", "head_depth", "points", "objects"):
            if getattr(self, name) < 1:
                raise UsageError(f"model.{name} = {getattr(self, name)}", hint="give 1 or more")
        if self.bins < 2:
            raise UsageError(f"model.bins = {self.bins}", hint="give 2 or more, like 16")
        for name in ("overlap", "least_score"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"model.{name} = {getattr(self, name)}", hint="give 0 to 1")
        for name in ("object_weight", "class_weight", "box_weight", "bin_weight"):
            if getattr(self, name) <= 0:
                raise UsageError(f"model.{name} = {getattr(self, name)}", hint="give more than 0")

    @property
    def strides(self) -> tuple[int, ...]:
        stages = len(self.widths)
        return tuple(2**n for n in range(stages - self.scales + 1, stages + 1))


class Net(nn.Module):
    """Called with truths it gives losses, without them `Said` and the `Grid` of its points: all
    goes through `forward`, where DistributedDataParallel sees it."""

    def __init__(self, config: YoloConfig, data: DataSpec) -> None:
        super().__init__()
        self.config = config
        scales, given = config.scales, [data.channels, *config.widths]
        self.stages = nn.ModuleList(
            _stage(one, other, config.depth if place else 0)
            for place, (one, other) in enumerate(itertools.pairwise(given))
        )
        widths = config.widths[-scales:]
        self.pool = _Pyramid(widths[-1])
        self.coarse = nn.ModuleList(
            _Block(fine + far, fine, config.depth, passing=False)
            for fine, far in itertools.pairwise(widths)
        )
        self.halve = nn.ModuleList(_convolution(fine, fine, 3, 2) for fine in widths[:-1])
        self.fine = nn.ModuleList(
            _Block(fine + far, far, config.depth, passing=False)
            for fine, far in itertools.pairwise(widths)
        )
        self.heads = nn.ModuleList(_Head(width, config, data) for width in widths)

    def forward(self, image: Tensor, truth: Truths | None = None) -> Losses | tuple[Said, Grid]:
        said, at = self._look(image)
        if truth is None:
            return said, at
        config = self.config
        weights = Weights(
            config.object_weight, config.class_weight, config.box_weight, config.bin_weight
        )
        with torch.autocast(image.device.type, enabled=False):
            return anchor_free.losses(said, at, truth, config.points, weights)

    def _look(self, image: Tensor) -> tuple[Said, Grid]:
        maps: list[Tensor] = []
        signal = self._filled(image)
        for stage in self.stages:
            signal = stage(signal)
            maps.append(signal)
        maps = maps[-self.config.scales :]
        maps[-1] = self.pool(maps[-1])
        for place in reversed(range(len(maps) - 1)):
            larger = F.interpolate(maps[place + 1], scale_factor=2.0)
            maps[place] = self.coarse[place](torch.cat([maps[place], larger], 1))
        for place, (halve, block) in enumerate(zip(self.halve, self.fine)):
            maps[place + 1] = block(torch.cat([halve(maps[place]), maps[place + 1]], 1))
        answers = [head(signal) for head, signal in zip(self.heads, maps)]
        shapes = [(signal.shape[2], signal.shape[3]) for signal in maps]
        said = Said(*(torch.cat(parts, 1) for parts in zip(*answers)))
        return said, anchor_free.grid(shapes, self.config.strides, image)

    def _filled(self, image: Tensor) -> Tensor:
        """Sides that the coarsest stride divides, by zeros to the right and below; at least two
        cells of it, so that a norm has several values in a single image."""
        stride = self.config.strides[-1]
        height, width = image.shape[-2:]
        right, below = -width % stride, -height % stride
        if max(height, width) <= stride:
            right += stride
        return F.pad(image, (0, right, 0, below)) if right or below else image


class _Head(nn.Module):
    """What and where, each by its own convolutions. Whether there is an object, which is the overlap
    to be expected, is a question to the second."""

    def __init__(self, width: int, config: YoloConfig, data: DataSpec) -> None:
        super().__init__()
        self.bins = config.bins
        widths = [width, *[config.head] * config.head_depth]
        pairs = list(itertools.pairwise(widths))
        self.what = nn.Sequential(*(_convolution(one, other, 3) for one, other in pairs))
        self.where = nn.Sequential(*(_convolution(one, other, 3) for one, other in pairs))
        self.classes = nn.Conv2d(config.head, max(1, len(data.classes)), 1)
        self.object = nn.Conv2d(config.head, 1, 1)
        self.distances = nn.Conv2d(config.head, 4 * config.bins, 1)
        for layer in (self.classes, self.object, self.distances):
            nn.init.normal_(layer.weight, std=0.01)
        self.object.bias = nn.Parameter(torch.full((1,), math.log(RARE / (1 - RARE))))
        if data.counts:
            counts = torch.tensor(data.counts).double() + 1
            self.classes.bias = nn.Parameter((counts / counts.sum()).log().float())
        # Bins of a distance grow less likely outwards: a new box is about four strides wide.
        falling = -0.5 * torch.arange(config.bins)
        self.distances.bias = nn.Parameter(falling.repeat(4))

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        what, where = self.what(signal), self.where(signal)
        classes = self.classes(what).flatten(2).transpose(1, 2)
        objects = self.object(where).flatten(1)
        distances = self.distances(where).flatten(2).transpose(1, 2)
        return objects, classes, distances.unflatten(2, (4, self.bins))


class _Block(nn.Module):
    """Half of the channels go through `depth` bottlenecks, the other half around them."""

    def __init__(self, given: int, width: int, depth: int, *, passing: bool = True) -> None:
        super().__init__()
        half = width // 2
        self.around = _convolution(given, half, 1)
        self.enter = _convolution(given, half, 1)
        self.inner = nn.Sequential(*(_Bottleneck(half, passing=passing) for _ in range(depth)))
        self.leave = _convolution(2 * half, width, 1)

    def forward(self, signal: Tensor) -> Tensor:
        both = torch.cat([self.inner(self.enter(signal)), self.around(signal)], 1)
        made: Tensor = self.leave(both)
        return made


class _Bottleneck(nn.Module):
    def __init__(self, width: int, *, passing: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(_convolution(width, width, 1), _convolution(width, width, 3))
        self.passing = passing

    def forward(self, signal: Tensor) -> Tensor:
        made: Tensor = self.inner(signal)
        return signal + made if self.passing else made


class _Pyramid(nn.Module):
    """Maxima over larger and larger surroundings, side by side (He et al., Spatial Pyramid Pooling,
    2014: https://arxiv.org/abs/1406.4729)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.enter = _convolution(width, half, 1)
        self.leave = _convolution(4 * half, width, 1)

    def forward(self, signal: Tensor) -> Tensor:
        views = [self.enter(signal)]
        for _ in range(3):
            views.append(F.max_pool2d(views[-1], 5, 1, 2))
        made: Tensor = self.leave(torch.cat(views, 1))
        return made


def _stage(given: int, width: int, depth: int) -> nn.Sequential:
    """Half the size, then blocks."""
    first = _convolution(given, width, 3, 2)
    return nn.Sequential(first, _Block(width, width, depth)) if depth else nn.Sequential(first)


def _convolution(given: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(given, width, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.SiLU(inplace=True),
    )


class Yolo(Family[YoloConfig]):
    task = DETECTION
    variants = {
        "base": YoloConfig(),
        "nano": YoloConfig(),
        "small": YoloConfig(
            widths=(32, 64, 128, 256, 512), depth=2, head=128, head_depth=2, points=10
        ),
        "tiny": YoloConfig(widths=(8, 8, 16, 16), head=16, bins=8, points=60),
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

    def build(self, config: YoloConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        truth = anchor_free.truths(batch["boxes"], batch["labels"], batch["crowd"])
        losses: Losses = module(batch["image"], truth)
        return losses

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        said, at = module(batch["image"])
        said = Said(*(logits.float() for logits in said))
        boxes, scores = anchor_free.boxes_of(said.distances, at), anchor_free.scores_of(said)
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
            "model.points": Choice((5, 10, 15)),
        }


def _best(config: YoloConfig, boxes: Tensor, scores: Tensor) -> Prediction:
    """Of (A, 4) and (A, K) the boxes that are left when those of one class that overlap are one."""
    from torchvision.ops import batched_nms

    certain, place = scores.flatten().topk(min(CANDIDATES, scores.numel()))
    point, label = place // scores.shape[1], place % scores.shape[1]
    found = boxes[point]
    kept = (certain >= config.least_score) & (areas(found) > 0)
    found, certain, label = found[kept], certain[kept], label[kept]
    best = batched_nms(found, certain, label, config.overlap)[: config.objects]
    return {
        "boxes": found[best].cpu(),
        "scores": certain[best].cpu(),
        "labels": label[best].cpu(),
    }


FAMILY = Yolo()
