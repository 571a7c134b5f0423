"""Mask R-CNN: the pixels of each object, for images with many small ones or few large ones.

He et al., Mask R-CNN, 2017, of torchvision's parts (BSD-3-Clause). `base` is a small network that
learns from scratch on a CPU; `resnet50_fpn` is torchvision's, and its weights fit it:

    tessera train mask_rcnn --variant resnet50_fpn --set model.weights=FILE_OR_URL --data DIR

A classifier's weights fit its body alone. `--set model.freeze=backbone` trains what stands on it.

    B images, C channels, H height, W width, D features, K classes, R regions

    image (B, C, H, W) -> pyramid of maps (B, D, ., .) -> proposals -> regions (R, D, 7, 7)
      -> class (R, K + 1) and box (R, K + 1, 4); (R, D, 14, 14) -> masks (R, K + 1, 28, 28)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from models.blocks.rcnn import DEFAULTS, FROM_FILE, RESNET50, TINY, Rcnn, RcnnConfig, assemble
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.tasks.instance_segmentation import INSTANCE_SEGMENTATION


@dataclass(frozen=True)
class MaskRcnnConfig(RcnnConfig):
    """`mask_widths`: channels of the convolutions that draw a region's mask."""

    mask_widths: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mask_widths or min(self.mask_widths) < 1:
            raise UsageError(
                f"model.mask_widths = {list(self.mask_widths)}", hint="give a list like [64, 64]"
            )


class MaskRcnn(Rcnn[MaskRcnnConfig]):
    task = INSTANCE_SEGMENTATION
    variants = {
        "base": MaskRcnnConfig(),
        "tiny": MaskRcnnConfig(**TINY, mask_widths=(16,)),
        "resnet50_fpn": MaskRcnnConfig(**RESNET50, mask_widths=(256, 256, 256, 256)),
    }
    defaults = DEFAULTS
    variant_defaults = {"resnet50_fpn": FROM_FILE}

    def build(self, config: MaskRcnnConfig, data: DataSpec) -> nn.Module:
        return assemble(config, data, mask_layers=config.mask_widths)


FAMILY = MaskRcnn()
