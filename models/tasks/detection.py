"""Detection: the boxes and classes of the objects of an image.

In: uint8 images with the boxes of their objects; later the predicted boxes. Out: the images as the
network sees them, the metrics, and predictions as JSON. Must not know any network.

    B images, C channels, H height, W width, N objects of an image

Boxes are float (N, 4): left, top, right, bottom in pixels of the network's input. A batch has lists
of B tensors: `boxes`, `labels` (N,) int64, `crowd` (N,) bool. A crowd is one box around many
objects; it is neither trained on nor counted as missed. A prediction has `boxes`, `scores` (N,) and
`labels`, sorted by score, the highest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.core.boxes import pairwise_iou, share_inside
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
    Task,
    Transform,
    View,
)
from models.metrics import average_precision
from models.transforms.geometry import inside
from models.transforms.object_augment import ObjectAugment, ObjectAugmentSettings

SHOWN_SCORE = 0.25
"""Objects with a lower score are not drawn, and don't count in `error_score`."""


class Detection(Task):
    name = "detection"
    reads = "detection"
    primary = Metric("map", "max")
    extra_metrics: ClassVar[tuple[str, ...]] = ("map50",)
    augment_settings: ClassVar[type[Any]] = ObjectAugmentSettings
    eval_batch = 32
    writes_coco_results = True

    def targets(self, batch: Batch) -> list[Target]:
        """`size` (H, W) of the image without padding, `boxes`, `labels` and `crowd`."""
        sizes = batch["extent"].tolist()
        fields = [[one.cpu() for one in batch[name]] for name in ("boxes", "labels", "crowd")]
        return [
            {"size": (height, width), "boxes": boxes, "labels": labels, "crowd": crowd}
            for (height, width), boxes, labels, crowd in zip(sizes, *fields)
        ]

    def augment(self, settings: ObjectAugmentSettings, data: DataSpec, *, train: bool) -> Transform:
        """A mosaic takes its other three images from the rows of the same rank, because a rank
        doesn't have the pixels of another. So mosaics do depend on the number of ranks."""
        return ObjectAugment(settings if train else ObjectAugmentSettings(), data)

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """The record that `average_precision` describes."""
        for name, labels in (("target", target["labels"]), ("prediction", prediction["labels"])):
            wrong = labels[(labels < 0) | (labels >= len(data.classes))]
            if len(wrong):
                raise TesseraError(
                    f"a {name} has class {int(wrong[0])}, but there are {len(data.classes)} classes"
                )
        return {
            "size": target["size"],
            "boxes": prediction["boxes"],
            "scores": prediction["scores"],
            "labels": prediction["labels"],
            "true_boxes": target["boxes"],
            "true_labels": target["labels"],
            "true_crowd": target["crowd"],
        }

    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """COCO's: `map` over IoU thresholds from 0.5 to 0.95, `map50`, `map75`, and `map/CLASS`."""
        if not records:
            raise TesseraError("there are no predictions to compute metrics of")
        return average_precision.metrics(records, data.classes)

    def bootstrap_metrics(
        self, records: Sequence[Record], data: DataSpec
    ) -> Callable[[Sequence[int]], dict[str, float]]:
        return average_precision.bootstrap_metrics(records, data.classes)

    def charts(self, records: Sequence[Record], data: DataSpec) -> list[Chart]:
        """Precision and recall of up to 10 classes at an IoU of 0.5."""
        lines = average_precision.curves(records, data.classes)
        return [Chart("Precision and recall of boxes", "recall", "precision", lines)]

    def error_score(self, record: Record) -> float:
        """1 - F1 of the objects that would be drawn, at an IoU of 0.5; 0 if there are no objects
        and none is predicted."""
        shown = record["scores"] >= SHOWN_SCORE
        boxes, labels = record["boxes"][shown], record["labels"][shown]
        truth, crowd = record["true_boxes"], record["true_crowd"]
        # as in COCO, on a crowd the share of the box inside it counts instead of the IoU
        ious = torch.where(crowd, share_inside(boxes, truth), pairwise_iou(boxes, truth))
        ious = ious * (labels[:, None] == record["true_labels"])
        hits, wrong, missed = _match(ious, crowd)
        return (wrong + missed) / (2 * hits + wrong + missed) if wrong + missed else 0.0

    def to_original_size(self, prediction: Prediction, view: View) -> Prediction:
        """Boxes in pixels of the image, clipped to it. Objects entirely outside are dropped."""
        shift = torch.tensor([view.shift[1], view.shift[0]] * 2)
        scale = torch.tensor([view.scale[1], view.scale[0]] * 2)
        height, width = view.size
        frame = torch.tensor([[0.0, 0.0, width, height]]).expand(len(prediction["boxes"]), 4)
        boxes, kept = inside((prediction["boxes"] - shift) / scale, frame, 0.0)
        restored = {name: value[kept] for name, value in prediction.items()}
        return restored | {"boxes": boxes[kept]}

    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """`objects`, each with `class`, `score` and `box`: left, top, right, bottom in pixels."""
        rows = zip(*(prediction[name].tolist() for name in ("labels", "scores", "boxes")))
        objects = [
            {"class": data.classes[label], "score": score, "box": [round(s, 2) for s in box]}
            for label, score, box in rows
        ]
        return {"objects": objects}

    def prediction_to_coco(self, prediction: Prediction) -> list[dict[str, Any]]:
        rows = zip(*(prediction[name].tolist() for name in ("labels", "scores", "boxes")))
        return [
            {
                "category_id": label + 1,
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
            for label, score, (left, top, right, bottom) in rows
        ]

    def panels(
        self,
        image: Tensor,
        prediction: Prediction | None,
        target: Target | None,
        data: DataSpec,
    ) -> list[Panel]:
        """The truth, and beside it the predictions with a score of 0.25 or more."""
        panels = []
        if target is not None:
            panels.append(self._panel(image, f"{len(target['boxes'])} in truth", target))
        if prediction is not None:
            shown = prediction["scores"] >= SHOWN_SCORE
            kept = {name: value[shown] for name, value in prediction.items()}
            panels.append(self._panel(image, f"{int(shown.sum())} found", kept))
        return panels or [Panel(image)]

    def _panel(self, image: Tensor, caption: str, objects: dict[str, Any]) -> Panel:
        return Panel(
            image,
            caption,
            boxes=objects["boxes"],
            labels=objects["labels"],
            scores=objects.get("scores"),
        )


DETECTION = Detection()


def _match(ious: Tensor, crowd: Tensor) -> tuple[int, int, int]:
    """True positives, false positives and false negatives, from IoUs (N, M) of predictions, sorted
    by score, with true objects of the same class. Predictions on a crowd don't count."""
    free = ~crowd
    hits = wrong = 0
    for row in ious:
        possible = row * free
        if possible.numel() and float(possible.max()) >= 0.5:
            free[int(possible.argmax())] = False
            hits += 1
        elif not bool((row * crowd >= 0.5).any()):
            wrong += 1
    return hits, wrong, int((~crowd).sum()) - hits
