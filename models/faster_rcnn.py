"""Faster R-CNN: a two-stage detector that predicts a box around each object.

Ren et al., Faster R-CNN, 2015, with the pyramid of Lin et al., 2017, built from torchvision's parts
(BSD-3-Clause). `base` is a small network that trains from scratch on a CPU; `resnet50_fpn` is
torchvision's, and its weights can be loaded:

    tessera train faster_rcnn --variant resnet50_fpn --set model.weights=FILE_OR_URL --data DIR

Weights of a classifier load into the body. `--set model.freeze=backbone` trains only the rest.

    B images, C channels, H height, W width, D features, K classes, R regions

    image (B, C, H, W) -> pyramid of feature maps (B, D, ., .) -> proposals -> regions (R, D, 7, 7)
      -> class (R, K + 1) and box (R, K + 1, 4)
"""

from __future__ import annotations

from models.blocks.rcnn import DEFAULTS, FROM_FILE, RESNET50, TINY, Rcnn, RcnnConfig
from models.tasks.detection import DETECTION


class FasterRcnn(Rcnn[RcnnConfig]):
    task = DETECTION
    variants = {
        "base": RcnnConfig(),
        "tiny": RcnnConfig(**TINY),
        "resnet50_fpn": RcnnConfig(**RESNET50),
    }
    defaults = DEFAULTS
    variant_defaults = {"resnet50_fpn": FROM_FILE}


FAMILY = FasterRcnn()
