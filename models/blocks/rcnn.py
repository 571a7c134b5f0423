"""What the two-stage detectors share: proposals of regions, then a class and a box for each region.

In: settings, the data spec, transformed batches. Out: a network of torchvision's parts
(BSD-3-Clause), its losses, and the objects it predicts. Must not know metrics or how objects are
drawn.

    B images, C channels, H height, W width, K classes, D features, L levels, N objects of one image

    image (B, C, H, W) -> body: L feature maps, each half as large as the one before
      -> pyramid (B, D, ., .) -> anchors of each level -> proposals, boxes that may hold an object
      -> regions cut from the pyramid -> class and box of each, and its mask if the network has
      masks

Ren et al., Faster R-CNN, 2015; He et al., Mask R-CNN, 2017; Lin et al., Feature Pyramid Networks
for Object Detection, 2017. The parameters have torchvision's names, so that its weights can be
loaded.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import pyramids
from models.blocks.transfer import Pretrained, check_choice, check_shares, read_pretrained
from models.core.errors import UsageError
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.fitted import DataFacts, Fitted, flip, frame, length, light
from models.core.spaces import Choice, LogUniform, Space
from models.core.weights import load_weights

Body = Literal["small", "resnet18", "resnet34", "resnet50"]
Norm = Literal["group", "batch"]
IN_CROWD = 0.5
"""Anchors and proposals with at least this share in a crowd are not examples of background."""
LOSS_NAMES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "anchor_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}
LONGEST_SIDE, STEPS = 640, 1500
"""Defaults that fit the data: the longest side of the input in pixels, and the steps that a
training needs."""
HEADS = ("roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits")
"""Layers whose shapes depend on the classes."""


@dataclass(frozen=True)
class RcnnConfig(Pretrained):
    body: Body = "small"
    """The backbone: "small" is a residual network of `channels` and `blocks`, trained from scratch;
    the others are torchvision's, with five levels."""
    channels: tuple[int, ...] = (32, 64, 128, 128)
    """Body "small": channels of each stage, multiples of 8. The first has a fourth of the image's
    size, each further one half of the one before."""
    blocks: int = 1
    """Body "small": residual blocks of each stage."""
    norm: Norm = "group"
    """Norm of the body. "group" trains with batches of any size; published weights need "batch",
    and their norms are then frozen."""
    features: int = 64
    """Channels of the feature pyramid."""
    anchors: tuple[tuple[int, ...], ...] = ((16,), (32,), (64,), (128,))
    """Sides of the anchors in pixels, a list for each level of the pyramid."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width of the anchors."""
    hidden: int = 256
    """Units of the dense layers over a region."""
    proposals: int = 500
    """Proposals of an image that are kept after non-maximum suppression."""
    sampled_anchors: int = 256
    """Anchors of an image that the losses use."""
    sampled_regions: int = 128
    """Regions of an image that the losses use."""
    max_detections: int = 100
    """At most so many objects of an image, those with the highest scores."""
    conf_threshold: float = 0.05
    """Objects with a lower score are dropped."""
    nms_iou: float = 0.5
    """Of two boxes of one class with a higher IoU, the one with the lower score is dropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("body", self.body, get_args(Body))
        check_choice("norm", self.norm, get_args(Norm))
        if not self.channels or min(self.channels) < 8 or any(c % 8 for c in self.channels):
            raise UsageError(
                f"model.channels = {list(self.channels)}", hint="give multiples of 8, like [32, 64]"
            )
        levels, per_level = self.levels, {len(sizes) for sizes in self.anchors}
        if len(self.anchors) != levels or len(per_level) > 1 or min(map(min, self.anchors)) < 1:
            raise UsageError(
                f"model.anchors = {[list(sizes) for sizes in self.anchors]}",
                hint=f"give a list of sizes for each of {levels} levels, all of one length",
            )
        if not self.ratios or min(self.ratios) <= 0:
            raise UsageError(f"model.ratios = {list(self.ratios)}", hint="like [0.5, 1, 2]")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise UsageError(f"model.{name} = {getattr(self, name)}", hint="give 1 or more")
        check_shares(self, "conf_threshold", "nms_iou")

    @property
    def levels(self) -> int:
        return len(self.channels) if self.body == "small" else 5


COUNTS = (
    "blocks",
    "features",
    "hidden",
    "proposals",
    "sampled_anchors",
    "sampled_regions",
    "max_detections",
)
C = TypeVar("C", bound=RcnnConfig)


class Net(nn.Module):
    """`stride`: pixels of the image for each pixel of the smallest feature map."""

    def __init__(
        self, backbone: nn.Module, rpn: nn.Module, roi_heads: nn.Module, stride: int
    ) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads, self.stride = backbone, rpn, roi_heads, stride

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> Any:
        """Images (B, C, H, W) and the size (height, width) of each without its padding.

        Returns the losses by name in training; otherwise for each image `boxes` (N, 4), `scores`
        (N,), `labels` (N,) counted from 1, and `masks` (N, 1, M, M), probabilities within the
        boxes.
        """
        from torchvision.models.detection.image_list import ImageList

        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        features = self.backbone(images)
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        if not self.training:
            detections, _ = self.roi_heads(features, proposals, sizes)
            return detections
        assert targets is not None
        proposals = [_outside_crowd(p, t) for p, t in zip(proposals, targets)]
        nothing = not any(len(p) + len(t["boxes"]) for p, t in zip(proposals, targets))
        if nothing:  # the heads need an input: DistributedDataParallel fails on unused parameters
            proposals[0] = proposals[0].new_tensor([[0, 0, self.stride, self.stride]])
        _, more = self.roi_heads(features, proposals, sizes, targets)
        return losses | {name: value * (not nothing) for name, value in more.items()}


def _outside_crowd(proposals: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """Drops the proposals that lie in a crowd, except those on an object."""
    from torchvision.ops import box_iou

    if not len(target["crowd"]):
        return proposals
    outside = _share_within(proposals, target["crowd"]) < IN_CROWD
    if len(target["boxes"]):
        outside |= box_iou(proposals, target["boxes"]).amax(1) >= 0.5
    return proposals[outside]


def _share_within(boxes: Tensor, regions: Tensor) -> Tensor:
    """(N,) in 0..1: the share of each box inside the region that holds most of it."""
    corner = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    other = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    sides = boxes[:, 2:] - boxes[:, :2]
    shared: Tensor = (other - corner).clamp(min=0).prod(2).amax(1)
    return shared / sides.prod(1).clamp(min=1e-6)


class Rcnn(Family[C], Generic[C]):
    """A two-stage detector. A subclass adds `task` and `variants`."""

    def build(self, config: C, data: DataSpec) -> nn.Module:
        return assemble(config, data, mask_layers=())

    def fitted_defaults(
        self, config: C, facts: DataFacts, settings: Mapping[str, Any], kept: Container[str]
    ) -> Iterable[Fitted]:
        yield from frame(facts, LONGEST_SIDE)
        yield from flip(facts)
        yield from light(facts, brightness=0.2, contrast=0.2, colour=0.1)
        yield from length(facts, settings, kept, steps=STEPS)

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """The sum of the parts; each is a mean over the sampled anchors, regions or masks."""
        losses = module(batch["image"], _sizes(batch), _targets(batch))
        named = {LOSS_NAMES[name]: value for name, value in losses.items()}
        return {"loss": torch.stack(list(named.values())).sum(), **named}

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        sizes = _sizes(batch)
        return [_prediction(f, s) for f, s in zip(module(batch["image"], sizes), sizes)]

    def warm_start(self, config: C, module: nn.Module) -> None:
        loaded = read_pretrained(config)
        if not loaded:
            return
        tensors = pyramids.fit_weights(loaded, module, HEADS, config.weights)
        load_weights(module, tensors, HEADS[0], config.weights)

    def frozen(self, config: C, module: nn.Module, epoch: int) -> frozenset[str]:
        """At least the norms of a pretrained body: small batches would only worsen their
        statistics."""
        if not config.weights:
            return frozenset()
        body = [name for name, _ in module.named_parameters() if name.startswith("backbone.body.")]
        if config.freeze == "backbone":
            return frozenset(body)
        norms = tuple(f"{n}." for n, m in module.named_modules() if isinstance(m, nn.BatchNorm2d))
        return frozenset(name for name in body if name.startswith(norms))

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-4, 1e-2),
            "train.batch_size": Choice((4, 8, 16)),
            "model.features": Choice((32, 64, 128)),
            "model.blocks": Choice((1, 2)),
            "augment.flip": Choice((False, True)),
        }


def _sizes(batch: Batch) -> list[tuple[int, int]]:
    return [(height, width) for height, width in batch["extent"].tolist()]


def _targets(batch: Batch) -> list[dict[str, Tensor]]:
    """The targets as torchvision expects them: classes from 1, because 0 is background."""
    targets = []
    for row, (boxes, labels, crowd) in enumerate(
        zip(batch["boxes"], batch["labels"], batch["crowd"])
    ):
        target = {"boxes": boxes[~crowd], "labels": labels[~crowd] + 1, "crowd": boxes[crowd]}
        if "masks" in batch:
            target["masks"] = batch["masks"][row][~crowd]
        targets.append(target)
    return targets


def _prediction(detections: Mapping[str, Tensor], size: tuple[int, int]) -> Prediction:
    """Sorted by score, for an image of (height, width)."""
    detections = {name: value.float().cpu() for name, value in detections.items()}
    order = detections["scores"].argsort(descending=True, stable=True)
    prediction: Prediction = {
        "boxes": detections["boxes"][order],
        "scores": detections["scores"][order],
        "labels": detections["labels"][order].long() - 1,
    }
    if "masks" in detections:
        prediction["masks"] = paste(detections["masks"][order, 0], prediction["boxes"], size)
    return prediction


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (N, H, W) of 0 and 1 from probabilities (N, M, M) within boxes (N, 4).

    One object after the other: as float32, all masks of a large image could take gigabytes.
    """
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    pasted = torch.zeros(len(masks), *size, dtype=torch.uint8)
    for into, mask, box in zip(pasted, masks, boxes):
        into.copy_(paste_masks_in_image(mask[None, None], box[None], size)[0, 0] >= 0.5)
    return pasted


def assemble(config: RcnnConfig, data: DataSpec, *, mask_layers: Sequence[int]) -> Net:
    """The network. `mask_layers`: channels of the mask head's convolutions, empty for no masks."""
    from torchvision.models.detection import faster_rcnn, roi_heads, rpn
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    classes = len(data.classes) + 1
    backbone = _backbone(config, data)
    anchors = AnchorGenerator(config.anchors, (config.ratios,) * config.levels)
    head = rpn.RPNHead(config.features, anchors.num_anchors_per_location()[0])
    many = {"training": 2 * config.proposals, "testing": 2 * config.proposals}
    kept = {"training": config.proposals, "testing": config.proposals}
    proposer = _proposer(anchors, head, 0.7, 0.3, config.sampled_anchors, 0.5, many, kept, 0.7)
    regions = roi_heads.RoIHeads(
        _pool(config, 7),
        faster_rcnn.TwoMLPHead(config.features * 7**2, config.hidden),
        faster_rcnn.FastRCNNPredictor(config.hidden, classes),
        0.5,
        0.5,
        config.sampled_regions,
        0.25,
        None,
        config.conf_threshold,
        config.nms_iou,
        config.max_detections,
        **(_mask_parts(config, classes, mask_layers) if mask_layers else {}),
    )
    net = Net(backbone, proposer, regions, stride=2 ** (config.levels + 1))
    exact = [backbone, head, regions.box_predictor, regions.mask_predictor]
    for module in exact:  # 16 bits are too few for a position in pixels
        if module is not None:
            module.register_forward_hook(_as_float)
    return net


def _backbone(config: RcnnConfig, data: DataSpec) -> nn.Module:
    if config.body != "small":
        return pyramids.resnet(config.body, data, norm=config.norm, features=config.features)
    return pyramids.small(
        data,
        channels=config.channels,
        blocks=config.blocks,
        norm=config.norm,
        features=config.features,
    )


def _as_float(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, Mapping):
        return {name: _as_float(module, inputs, value) for name, value in output.items()}
    return tuple(_as_float(module, inputs, value) for value in output)


def _pool(config: RcnnConfig, side: int) -> Any:
    """Cuts regions from the level that suits their size, as in equation 1 of the pyramid's paper.

    The levels' scales are set here, because torchvision would guess them from the first images.
    """
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.poolers import initLevelMapper

    levels = config.levels if config.body == "small" else 4
    pool = MultiScaleRoIAlign([str(level) for level in range(levels)], side, 2)
    pool.scales = [2.0 ** -(level + 2) for level in range(levels)]
    pool.map_levels = initLevelMapper(2, levels + 1)
    return pool


def _mask_parts(config: RcnnConfig, classes: int, layers: Sequence[int]) -> dict[str, Any]:
    from torchvision.models.detection import mask_rcnn

    return {
        "mask_roi_pool": _pool(config, 14),
        "mask_head": mask_rcnn.MaskRCNNHeads(config.features, list(layers), 1),
        "mask_predictor": mask_rcnn.MaskRCNNPredictor(layers[-1], layers[-1], classes),
    }


def _proposer(*settings: Any) -> Any:
    """torchvision's region proposal network, without losses for anchors in a crowd."""
    from torchvision.models.detection.rpn import RegionProposalNetwork

    class Proposer(RegionProposalNetwork):  # type: ignore[misc]
        def assign_targets_to_anchors(self, anchors: Any, targets: Any) -> Any:
            labels, boxes = super().assign_targets_to_anchors(anchors, targets)
            for label, anchor, target in zip(labels, anchors, targets):
                if len(target["crowd"]):
                    crowded = _share_within(anchor, target["crowd"]) >= IN_CROWD
                    label[crowded & (label == 0)] = -1
            return labels, boxes

        def compute_loss(self, objectness: Any, deltas: Any, labels: Any, targets: Any) -> Any:
            if any(bool((label >= 0).any()) for label in labels):
                return super().compute_loss(objectness, deltas, labels, targets)
            return objectness.sum() * 0, deltas.sum() * 0

    return Proposer(*settings)


TINY: dict[str, Any] = {
    "channels": (16, 16),
    "features": 16,
    "anchors": ((16,), (24,)),
    "ratios": (1.0,),
    "hidden": 32,
    "proposals": 32,
    "sampled_anchors": 64,
    "sampled_regions": 16,
    "max_detections": 20,
}
RESNET50: dict[str, Any] = {
    "body": "resnet50",
    "norm": "batch",
    "features": 256,
    "anchors": ((32,), (64,), (128,), (256,), (512,)),
    "hidden": 1024,
    "proposals": 1000,
    "sampled_regions": 512,
}
"""torchvision's maskrcnn_resnet50_fpn and fasterrcnn_resnet50_fpn."""
DEFAULTS: dict[str, Any] = {
    "optim.model.kind": "adamw",
    "optim.model.lr": 1e-3,
    "optim.model.weight_decay": 1e-4,
    "schedule.kind": "cosine",
    "schedule.warmup": 0.05,
    "train.batch_size": 8,
    "train.clip_norm": 5.0,
    "train.epochs": 20,
    "augment.flip": True,
}
FROM_FILE: dict[str, Any] = {
    "optim.model.kind": "sgd",
    "optim.model.lr": 0.01,
    "optim.model.momentum": 0.9,
}
