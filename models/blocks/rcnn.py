"""What the families of regions share: proposals of where something may be, then what it is.

In: settings, what is known of the data, transformed batches. Out: a network of torchvision's parts
(BSD-3-Clause), its losses, and the objects that it finds. Must not know figures or how objects are
drawn.

    B images, C channels, H height, W width, K classes, D features, L levels, N objects of one image

    image (B, C, H, W) -> body: L maps, each half as large as the one before -> pyramid (B, D, ., .)
      -> anchors of each level -> proposals, boxes that may hold an object
      -> regions cut from the pyramid -> class and box of each, and its mask where there are masks

Ren et al., Faster R-CNN, 2015; He et al., Mask R-CNN, 2017; Lin et al., Feature Pyramid Networks for
Object Detection, 2017. The names of the parameters are torchvision's, so that its weights fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import pyramids
from models.blocks.transfer import Pretrained, check_choice
from models.core.errors import UsageError
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.spaces import Choice, LogUniform, Space
from models.core.weights import load_weights, read_weights

Body = Literal["small", "resnet18", "resnet34", "resnet50"]
Norm = Literal["group", "batch"]
IN_CROWD = 0.5
"""An anchor or a proposal of which so much lies in a crowd is no example of background."""
LOSS_NAMES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "anchor_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}
HEADS = ("roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits")
"""What depends on the classes."""


@dataclass(frozen=True)
class RcnnConfig(Pretrained):
    """`body`: "small" has a stage for each of `widths`, its channels, the first at a fourth of the
    image's size, of `blocks` residual blocks each; the others are torchvision's, with five levels.
    `norm`: "group" learns from batches of any size; weights from files are made with "batch", and
    their norms are then kept as they are. `features`: channels of the pyramid. `anchors`: sides in
    pixels of each level's anchors; `ratios`: their heights over widths. `hidden`: width of the dense
    layers over a region.

    `proposals`: so many an image are looked at, after the suppression of those that overlap.
    `sampled_anchors`, `sampled_regions`: so many an image are trained on. `detections`: so many
    objects an image are found at most, of a score over `least_score`, and of a class no two whose
    boxes overlap by more than `overlap` (IoU)."""

    body: Body = "small"
    widths: tuple[int, ...] = (32, 64, 128, 128)
    blocks: int = 1
    norm: Norm = "group"
    features: int = 64
    anchors: tuple[tuple[int, ...], ...] = ((16,), (32,), (64,), (128,))
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    hidden: int = 256
    proposals: int = 500
    sampled_anchors: int = 256
    sampled_regions: int = 128
    detections: int = 100
    least_score: float = 0.05
    overlap: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("body", self.body, get_args(Body))
        check_choice("norm", self.norm, get_args(Norm))
        if not self.widths or min(self.widths) < 8 or any(w % 8 for w in self.widths):
            raise UsageError(
                f"model.widths = {list(self.widths)}", hint="give multiples of 8, like [32, 64]"
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
        for name in ("least_score", "overlap"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(
                    f"model.{name} = {getattr(self, name)}", hint="give 0 or more, below 1"
                )

    @property
    def levels(self) -> int:
        return len(self.widths) if self.body == "small" else 5


COUNTS = (
    "blocks",
    "features",
    "hidden",
    "proposals",
    "sampled_anchors",
    "sampled_regions",
    "detections",
)
C = TypeVar("C", bound=RcnnConfig)


class Net(nn.Module):
    """`stride`: pixels of the image in one of the smallest map."""

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
        """Images (B, C, H, W), of which so much (height, width) is picture. In training the losses
        by name; otherwise for each image `boxes` (N, 4), `scores` (N,), `labels` (N,), counted from
        1, and `masks` (N, 1, M, M), probabilities within the boxes."""
        from torchvision.models.detection.image_list import ImageList

        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        features = self.backbone(images)
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        if not self.training:
            found, _ = self.roi_heads(features, proposals, sizes)
            return found
        assert targets is not None
        proposals = [_outside_crowd(p, t) for p, t in zip(proposals, targets)]
        nothing = not any(len(p) + len(t["boxes"]) for p, t in zip(proposals, targets))
        if nothing:  # something has to go through the heads, so that all parameters are used
            proposals[0] = proposals[0].new_tensor([[0, 0, self.stride, self.stride]])
        _, more = self.roi_heads(features, proposals, sizes, targets)
        return losses | {name: value * (not nothing) for name, value in more.items()}


def _outside_crowd(proposals: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """The proposals that aren't in a crowd, but for those that are on an object."""
    from torchvision.ops import box_iou

    if not len(target["crowd"]):
        return proposals
    outside = _share_within(proposals, target["crowd"]) < IN_CROWD
    if len(target["boxes"]):
        outside |= box_iou(proposals, target["boxes"]).amax(1) >= 0.5
    return proposals[outside]


def _share_within(boxes: Tensor, regions: Tensor) -> Tensor:
    """(N,): how much of each box lies within the region that has most of it, from 0 to 1."""
    corner = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    other = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    sides = boxes[:, 2:] - boxes[:, :2]
    shared: Tensor = (other - corner).clamp(min=0).prod(2).amax(1)
    return shared / sides.prod(1).clamp(min=1e-6)


class Rcnn(Family[C], Generic[C]):
    """A family that finds objects by regions; `task` and the variants are what is left to say."""

    def build(self, config: C, data: DataSpec) -> nn.Module:
        return assemble(config, data, mask_layers=())

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """Each part is a mean over what was sampled of the batch; a mask counts as an object."""
        losses = module(batch["image"], _sizes(batch), _targets(batch))
        named = {LOSS_NAMES[name]: value for name, value in losses.items()}
        return {"loss": torch.stack(list(named.values())).sum(), **named}

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        sizes = _sizes(batch)
        return [_prediction(f, s) for f, s in zip(module(batch["image"], sizes), sizes)]

    def warm_start(self, config: C, module: nn.Module) -> None:
        if not config.weights:
            if config.freeze != "none":
                raise UsageError(
                    f"model.freeze = {config.freeze!r} would keep a network that has learned nothing",
                    hint="name weights: --set model.weights=FILE_OR_URL",
                )
            return
        found = read_weights(config.weights, config.weights_sha256)
        tensors = pyramids.fit_weights(found, module, HEADS, config.weights)
        load_weights(module, tensors, HEADS[0], config.weights)

    def frozen(self, config: C, module: nn.Module, epoch: int) -> frozenset[str]:
        """Of a pretrained body at least the norms, whose statistics a few images can't better."""
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
    """What torchvision's parts are trained on: classes from 1, since 0 is background."""
    targets = []
    for row, (boxes, labels, crowd) in enumerate(
        zip(batch["boxes"], batch["labels"], batch["crowd"])
    ):
        target = {"boxes": boxes[~crowd], "labels": labels[~crowd] + 1, "crowd": boxes[crowd]}
        if "masks" in batch:
            target["masks"] = batch["masks"][row][~crowd]
        targets.append(target)
    return targets


def _prediction(found: Mapping[str, Tensor], size: tuple[int, int]) -> Prediction:
    """Sorted by score; everything within the picture, of (height, width)."""
    found = {name: value.float().cpu() for name, value in found.items()}
    order = found["scores"].argsort(descending=True, stable=True)
    prediction: Prediction = {
        "boxes": found["boxes"][order],
        "scores": found["scores"][order],
        "labels": found["labels"][order].long() - 1,
    }
    if "masks" in found:
        prediction["masks"] = paste(found["masks"][order, 0], prediction["boxes"], size)
    return prediction


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (N, H, W) of 0 and 1 from probabilities (N, M, M) within boxes (N, 4). One object after
    the other, since all of them as numbers of a large image could be gigabytes."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    pasted = torch.zeros(len(masks), *size, dtype=torch.uint8)
    for into, mask, box in zip(pasted, masks, boxes):
        into.copy_(paste_masks_in_image(mask[None, None], box[None], size)[0, 0] >= 0.5)
    return pasted


def assemble(config: RcnnConfig, data: DataSpec, *, mask_layers: Sequence[int]) -> Net:
    """The network; with masks if there are `mask_layers`, the channels of its convolutions."""
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
        config.least_score,
        config.overlap,
        config.detections,
        **(_mask_parts(config, classes, mask_layers) if mask_layers else {}),
    )
    net = Net(backbone, proposer, regions, stride=2 ** (config.levels + 1))
    exact = [backbone, head, regions.box_predictor, regions.mask_predictor]
    for module in exact:  # half a number's digits are too few for a place in an image
        if module is not None:
            module.register_forward_hook(_as_float)
    return net


def _backbone(config: RcnnConfig, data: DataSpec) -> nn.Module:
    if config.body != "small":
        return pyramids.resnet(config.body, data, norm=config.norm, features=config.features)
    return pyramids.small(
        data,
        widths=config.widths,
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
    """Cuts regions from the level whose pixels suit their size, equation 1 of the pyramid's paper.
    torchvision would guess the levels' scales from the first images that it sees."""
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
    """torchvision's, but what lies in a crowd is no background to learn from."""
    from torchvision.models.detection.rpn import RegionProposalNetwork

    class Proposer(RegionProposalNetwork):  # type: ignore[misc]
        def assign_targets_to_anchors(self, anchors: Any, targets: Any) -> Any:
            labels, boxes = super().assign_targets_to_anchors(anchors, targets)
            for label, anchor, target in zip(labels, anchors, targets):
                if len(target["crowd"]):
                    crowded = _share_within(anchor, target["crowd"]) >= IN_CROWD
                    label[crowded & (label == 0)] = -1
            return labels, boxes

        def compute_loss(self, objectness: Any, deltas: Any, labels: Any, wanted: Any) -> Any:
            if any(bool((label >= 0).any()) for label in labels):
                return super().compute_loss(objectness, deltas, labels, wanted)
            return objectness.sum() * 0, deltas.sum() * 0

    return Proposer(*settings)


TINY: dict[str, Any] = {
    "widths": (16, 16),
    "features": 16,
    "anchors": ((16,), (24,)),
    "ratios": (1.0,),
    "hidden": 32,
    "proposals": 32,
    "sampled_anchors": 64,
    "sampled_regions": 16,
    "detections": 20,
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
