"""Instance segmentation: the pixels and the class of each object of an image.

In: uint8 images with the boxes and masks of their objects; later the predicted ones. Out: the
images as the network sees them, the metrics, and predictions as JSON. Must not know any network.

    B images, H height, W width, N objects of an image

It is detection with masks, uint8 (N, H, W) of 0 and 1: in a batch a list of B, in a target and a
prediction at the size of the image without padding. Records have COCO's compressed run lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from models.core.errors import TesseraError
from models.core.family import (
    Batch,
    Chart,
    DataSpec,
    Metric,
    Panel,
    Prediction,
    Record,
    Target,
    Transform,
    View,
)
from models.metrics import average_precision
from models.tasks.detection import Detection
from models.transforms.mask_augment import MaskAugment, MaskAugmentSettings


class InstanceSegmentation(Detection):
    name = "instance_segmentation"
    reads = "instance_segmentation"
    primary = Metric("mask_map", "max")
    extra_metrics: ClassVar[tuple[str, ...]] = ("mask_map50", "box_map50")
    augment_settings: ClassVar[type[Any]] = MaskAugmentSettings
    eval_batch = 8

    def targets(self, batch: Batch) -> list[Target]:
        """As for detection, with `masks`."""
        targets = super().targets(batch)
        for target, masks in zip(targets, batch["masks"]):
            height, width = target["size"]
            target["masks"] = masks[:, :height, :width].cpu()
        return targets

    def augment(self, settings: Any, data: DataSpec, *, train: bool) -> Transform:
        return MaskAugment(settings if train else MaskAugmentSettings(), data)

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        record = super().make_record(prediction, target, data)
        for name, side in (("masks", prediction), ("true_masks", target)):
            masks = side["masks"]
            if masks.shape[-2:] != target["size"]:
                raise TesseraError(
                    f"{name} have {tuple(masks.shape[-2:])} pixels, the image has {target['size']}"
                )
            record[name] = run_lengths(masks)
        return record

    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """COCO's for masks: `mask_map` over IoU thresholds from 0.5 to 0.95, `mask_map50`,
        `mask_map75` and `mask_map/CLASS`; and for boxes `box_map`, `box_map50` and so on."""
        if not records:
            raise TesseraError("there are no predictions to compute metrics of")
        return self.bootstrap_metrics(records, data)(range(len(records)))

    def bootstrap_metrics(
        self, records: Sequence[Record], data: DataSpec
    ) -> Callable[[Sequence[int]], dict[str, float]]:
        masks = average_precision.bootstrap_metrics(records, data.classes, "segm")
        boxes = average_precision.bootstrap_metrics(records, data.classes, "bbox")
        return lambda positions: {
            **{f"mask_{name}": value for name, value in masks(positions).items()},
            **{f"box_{name}": value for name, value in boxes(positions).items()},
        }

    def charts(self, records: Sequence[Record], data: DataSpec) -> list[Chart]:
        """Precision and recall of masks and of boxes, at an IoU of 0.5."""
        lines = average_precision.curves(records, data.classes, "segm")
        masks = Chart("Precision and recall of masks", "recall", "precision", lines)
        return [masks, *super().charts(records, data)]

    def to_original_size(self, prediction: Prediction, view: View) -> Prediction:
        """Boxes and masks in pixels of the image. Objects entirely outside are dropped."""
        restored = super().to_original_size(prediction, view)
        return restored | {"masks": _restore_masks(restored["masks"], view)}

    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """`objects`, each with `class`, `score`, `box`, and `mask`: `size` (height, width) and
        `counts`, COCO's compressed run lengths."""
        result = super().prediction_to_json(prediction, data)
        for one, mask in zip(result["objects"], _segmentations(prediction["masks"])):
            one["mask"] = mask
        return result

    def prediction_to_coco(self, prediction: Prediction) -> list[dict[str, Any]]:
        objects = super().prediction_to_coco(prediction)
        for one, mask in zip(objects, _segmentations(prediction["masks"])):
            one["segmentation"] = mask
        return objects

    def _panel(self, image: Tensor, caption: str, objects: dict[str, Any]) -> Panel:
        return Panel(
            image,
            caption,
            boxes=objects["boxes"],
            labels=objects["labels"],
            scores=objects.get("scores"),
            masks=objects["masks"],
        )


INSTANCE_SEGMENTATION = InstanceSegmentation()


def run_lengths(masks: Tensor) -> list[bytes]:
    """COCO's compressed run lengths, columns first, of uint8 (N, H, W) of 0 and 1."""
    import numpy as np
    from pycocotools import mask as coco

    # One by one: a Fortran-ordered copy of all masks could take gigabytes.
    return [coco.encode(np.asfortranarray(mask))["counts"] for mask in masks.cpu().numpy()]


def _segmentations(masks: Tensor) -> list[dict[str, Any]]:
    height, width = masks.shape[-2:]
    return [
        {"size": [height, width], "counts": counts.decode("ascii")} for counts in run_lengths(masks)
    ]


def _restore_masks(masks: Tensor, view: View) -> Tensor:
    """uint8 (N, H, W) at the size of the image, 0 where the network didn't see it."""
    height, width = view.size
    if view.scale != (1.0, 1.0):
        inner = [round(side * scale) for side, scale in zip(view.size, view.scale)]
        cut = masks[:, : inner[0], : inner[1]]
        large = torch.zeros(len(masks), height, width, dtype=torch.uint8)
        for into, mask in zip(large, cut):  # one by one: as float32 they take four times the memory
            shape = (height, width)
            into.copy_(F.interpolate(mask[None, None].float(), shape, mode="bilinear")[0, 0] >= 0.5)
        return large
    down, right = view.shift
    large = torch.zeros(len(masks), height, width, dtype=torch.uint8)
    top, left = max(0, down), max(0, right)
    seen = masks[:, top : top + height, left : left + width]
    row, column = max(0, -down), max(0, -right)
    large[:, row : row + seen.shape[1], column : column + seen.shape[2]] = seen
    return large
