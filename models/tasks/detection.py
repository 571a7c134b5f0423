"""Detection: where the objects of an image are, and what they are.

In: uint8 images with the boxes of their objects; later the boxes that a network found. Out: the
images as the network sees them, the figures, and the answers as JSON. Must not know any network.

    B images, C channels, H height, W width, N objects of an image

Boxes are float (N, 4): left, top, right, bottom in pixels of what the network saw. A batch has
lists of B tensors: `boxes`, `labels` (N,) int64, `crowd` (N,) bool: many objects in one box, neither
trained on nor missed. A prediction has `boxes`, `scores` (N,) and `labels`, the most certain first.
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
"""Objects that are less certain are not drawn, nor counted as mistakes of an image."""


class Detection(Task):
    name = "detection"
    reads = "detection"
    primary = Metric("map", "max")
    extra_metrics: ClassVar[tuple[str, ...]] = ("map50",)
    augment_settings: ClassVar[type[Any]] = ObjectAugmentSettings
    eval_batch = 32
    writes_coco_results = True

    def targets(self, batch: Batch) -> list[Target]:
        """`size` (H, W) of the picture, `boxes`, `labels` and `crowd`."""
        sizes = batch["extent"].tolist()
        fields = [[one.cpu() for one in batch[name]] for name in ("boxes", "labels", "crowd")]
        return [
            {"size": (height, width), "boxes": boxes, "labels": labels, "crowd": crowd}
            for (height, width), boxes, labels, crowd in zip(sizes, *fields)
        ]

    def augment(self, settings: ObjectAugmentSettings, data: DataSpec, *, train: bool) -> Transform:
        """A mosaic takes the other three images from the rows of the same rank, so with another
        number of ranks it is made of others: no rank has the pixels of another."""
        return ObjectAugment(settings if train else ObjectAugmentSettings(), data)

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """As `average_precision` has it."""
        for name, labels in (("target", target["labels"]), ("prediction", prediction["labels"])):
            wrong = labels[(labels < 0) | (labels >= len(data.classes))]
            if len(wrong):
                raise TesseraError(
                    f"a {name} is of class {int(wrong[0])}, but there are "
                    f"{len(data.classes)} classes"
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
        """COCO's: `map` over overlaps from 0.5 to 0.95, `map50`, `map75`, and `map/CLASS`."""
        if not records:
            raise TesseraError("there is no answer to make figures of")
        return average_precision.metrics(records, data.classes)

    def bootstrap_metrics(
        self, records: Sequence[Record], data: DataSpec
    ) -> Callable[[Sequence[int]], dict[str, float]]:
        return average_precision.bootstrap_metrics(records, data.classes)

    def charts(self, records: Sequence[Record], data: DataSpec) -> list[Chart]:
        """Precision by recall at an overlap of 0.5, of up to 10 classes."""
        lines = average_precision.curves(records, data.classes)
        return [Chart("Precision and recall of boxes", "recall", "precision", lines)]

    def error_score(self, record: Record) -> float:
        """1 - F1 of the objects drawn, at an overlap of 0.5; 0 where nothing is and nothing is
        found."""
        shown = record["scores"] >= SHOWN_SCORE
        boxes, labels = record["boxes"][shown], record["labels"][shown]
        truth, crowd = record["true_boxes"], record["true_crowd"]
        # as in COCO, of a box on a crowd only the box itself counts
        found = torch.where(crowd, share_inside(boxes, truth), pairwise_iou(boxes, truth))
        found = found * (labels[:, None] == record["true_labels"])
        hits, wrong, missed = _match(found, crowd)
        return (wrong + missed) / (2 * hits + wrong + missed) if wrong + missed else 0.0

    def to_original_size(self, prediction: Prediction, view: View) -> Prediction:
        """Boxes in pixels of the image, cut to it; what lies outside of it is no object."""
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
        """The truth, and beside it what was found with a score of 0.25 or more."""
        panels = []
        if target is not None:
            panels.append(self._panel(image, f"{len(target['boxes'])} in truth", target))
        if prediction is not None:
            shown = prediction["scores"] >= SHOWN_SCORE
            kept = {name: value[shown] for name, value in prediction.items()}
            panels.append(self._panel(image, f"{int(shown.sum())} found", kept))
        return panels or [Panel(image)]

    def _panel(self, image: Tensor, caption: str, said: dict[str, Any]) -> Panel:
        return Panel(
            image, caption, boxes=said["boxes"], labels=said["labels"], scores=said.get("scores")
        )


DETECTION = Detection()


def _match(found: Tensor, crowd: Tensor) -> tuple[int, int, int]:
    """Objects found, mistakes and misses, from overlaps (N, M) of answers, the most certain first,
    with truths of the same class. An answer on a crowd is neither."""
    free = ~crowd
    hits = wrong = 0
    for row in found:
        possible = row * free
        if possible.numel() and float(possible.max()) >= 0.5:
            free[int(possible.argmax())] = False
            hits += 1
        elif not bool((row * crowd >= 0.5).any()):
            wrong += 1
    return hits, wrong, int((~crowd).sum()) - hits
