"""Mask R-CNN: a two-stage detector that also predicts the pixels of each object.

He et al., Mask R-CNN, 2017, built from torchvision's parts (BSD-3-Clause). `base` is a small
network that trains from scratch on a CPU; `resnet50_fpn` is torchvision's, and its weights can be
loaded:

    tessera train mask_rcnn --variant resnet50_fpn --set model.weights=FILE_OR_URL --data DIR

Weights of a classifier load into the body. `--set model.freeze=backbone` trains only the rest.

    B images, C channels, H height, W width, D features, K classes, R regions

    image (B, C, H, W) -> pyramid of feature maps (B, D, ., .) -> proposals -> regions (R, D, 7, 7)
      -> class (R, K + 1) and box (R, K + 1, 4); (R, D, 14, 14) -> masks (R, K + 1, 28, 28)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from models.blocks.rcnn import DEFAULTS, FROM_FILE, RESNET50, TINY, Rcnn, RcnnConfig, assemble
from models.blocks.transfer import check_channels
from models.core.family import DataSpec
from models.tasks.instance_segmentation import INSTANCE_SEGMENTATION


@dataclass(frozen=True)
class MaskRcnnConfig(RcnnConfig):
    mask_channels: tuple[int, ...] = (64, 64)
    """Channels of the convolutions of the mask head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_channels("mask_channels", self.mask_channels, example="[64, 64]")


class MaskRcnn(Rcnn[MaskRcnnConfig]):
    task = INSTANCE_SEGMENTATION
    variants = {
        "base": MaskRcnnConfig(),
        "tiny": MaskRcnnConfig(**TINY, mask_channels=(16,)),
        "resnet50_fpn": MaskRcnnConfig(**RESNET50, mask_channels=(256, 256, 256, 256)),
    }
    defaults = DEFAULTS
    variant_defaults = {"resnet50_fpn": FROM_FILE}

    def build(self, config: MaskRcnnConfig, data: DataSpec) -> nn.Module:
        return assemble(config, data, mask_layers=config.mask_channels)


FAMILY = MaskRcnn()
