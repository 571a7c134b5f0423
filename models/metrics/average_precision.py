"""Average precision of predicted objects, as COCO defines it.

In: a record for each image, with predicted and true objects. Out: exact metrics. pycocotools does
the counting (Lin et al., Microsoft COCO, 2014, and its reference code). Must not know any network.

    N predicted objects of an image, M true objects, H height, W width
    T IoU thresholds, R recall levels, K classes

A record has `size` (H, W); of the predictions `boxes` float (N, 4): left, top, right, bottom,
`scores` (N,) and `labels` (N,); of the truth `true_boxes` (M, 4), `true_labels` (M,) and
`true_crowd` (M,). To compare masks it also has `masks` and `true_masks`, lists of N and M run
lengths: the bytes that `pycocotools.mask.encode` returns.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from models.core.family import Record

Kind = Literal["bbox", "segm"]
MAX_DETECTIONS = 100
"""Objects of an image and class that count, those with the highest scores, as in COCO."""
NAMED_CLASSES = 50
"""At most so many classes get a metric of their own."""
_EVERY_SIZE = ((0.0, 1e10),)


def metrics(
    records: Sequence[Record],
    classes: Sequence[str],
    kind: Kind = "bbox",
    *,
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, float]:
    """`map`, the mean of the average precision over IoU thresholds of 0.5, 0.55 … 0.95 and over the
    classes in the truth; `map50` and `map75` at one threshold; `map/CLASS` for the first 50 of
    these classes. All are 0 if there are no true objects.

    `max_detections`: objects of an image and class that count, those with the highest scores. A
    crowd doesn't count as missed, nor do predictions inside it as wrong. Equal scores are sorted by
    the order of the images.
    """
    return bootstrap_metrics(records, classes, kind, max_detections=max_detections)(
        range(len(records))
    )


def bootstrap_metrics(
    records: Sequence[Record],
    classes: Sequence[str],
    kind: Kind = "bbox",
    *,
    max_detections: int = MAX_DETECTIONS,
) -> Callable[[Sequence[int]], dict[str, float]]:
    """A function from positions in `records` to the `metrics` of these images. Predictions and
    truth are matched once, here; the function only accumulates."""
    evaluation = _evaluate(records, len(classes), kind, max_detections)
    # for each class, one area range and each image: a dict, or None if there are no objects
    compared, count = evaluation.evalImgs, max(len(records), 1)
    names = metric_names(classes)

    def of(positions: Sequence[int]) -> dict[str, float]:
        evaluation.params.imgIds = evaluation._paramsEval.imgIds = list(range(len(positions)))
        evaluation.evalImgs = [
            compared[start + i] for start in range(0, len(compared), count) for i in positions
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
        return _metrics(evaluation, names)

    return of


def _metrics(evaluation: Any, names: Sequence[str]) -> dict[str, float]:
    # precision (T, R, K), -1 for a class without true objects
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    overlaps = evaluation.params.iouThrs
    values = {
        "map": _mean(precision),
        "map50": _mean(precision[np.isclose(overlaps, 0.5)]),
        "map75": _mean(precision[np.isclose(overlaps, 0.75)]),
    }
    occurring = [k for k in range(len(names)) if (precision[:, :, k] >= 0).any()]
    for k in occurring[:NAMED_CLASSES]:
        values[f"map/{names[k]}"] = _mean(precision[:, :, k])
    return values


def curves(
    records: Sequence[Record], classes: Sequence[str], kind: Kind = "bbox", *, most: int = 10
) -> dict[str, tuple[list[float], list[float]]]:
    """Class -> (recalls, precisions) at an IoU of 0.5, for the first `most` classes that occur."""
    evaluation = _evaluate(records, len(classes), kind, MAX_DETECTIONS)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, 0]
    recalls = evaluation.params.recThrs.tolist()
    names = metric_names(classes)
    occurring = [k for k in range(len(classes)) if (precision[:, k] >= 0).any()]
    return {names[k]: (recalls, precision[:, k].tolist()) for k in occurring[:most]}


def metric_names(classes: Iterable[str]) -> list[str]:
    """For each class a unique name that can be part of a metric's name: letters, digits, `_`, `-`
    and single spaces."""
    names: list[str] = []
    taken: set[str] = set()
    for name in classes:
        plain = re.sub(r"[^A-Za-z0-9_ -]", "_", " ".join(name.split()))[:80].strip() or "_"
        unique, number = plain, 1
        while unique.lower() in taken:
            number += 1
            unique = f"{plain}-{number}"
        taken.add(unique.lower())
        names.append(unique)
    return names


def _mean(precision: np.ndarray[Any, Any]) -> float:
    known = precision[precision >= 0]
    return float(known.mean()) if known.size else 0.0


def _evaluate(records: Sequence[Record], classes: int, kind: Kind, max_detections: int) -> Any:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth = _as_coco(records, classes, kind, "true_")
        predictions = _as_coco(records, classes, kind, "")
        evaluation = COCOeval(truth, predictions, kind)
        evaluation.params.imgIds = list(range(1, len(records) + 1))
        evaluation.params.catIds = list(range(1, classes + 1))
        evaluation.params.maxDets = [max_detections]
        evaluation.params.areaRng = [list(span) for span in _EVERY_SIZE]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
    return evaluation


def _as_coco(records: Sequence[Record], classes: int, kind: Kind, side: str) -> Any:
    """The predicted or the true objects as a COCO data set. Ids begin with 1: 0 means no match."""
    from pycocotools import mask as run_lengths
    from pycocotools.coco import COCO

    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for image_id, record in enumerate(records, 1):
        height, width = (int(pixels) for pixels in record["size"])
        images.append({"id": image_id, "height": height, "width": width})
        boxes = np.asarray(record[f"{side}boxes"], dtype=np.float64).reshape(-1, 4)
        labels = np.asarray(record[f"{side}labels"]).tolist()
        more = np.asarray(record["true_crowd" if side else "scores"], np.float64).tolist()
        corners = boxes[:, :2].tolist()
        sizes = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).tolist()
        for i, ((left, top), (wide, high)) in enumerate(zip(corners, sizes)):
            one: dict[str, Any] = {
                "id": len(objects) + 1,
                "image_id": image_id,
                "category_id": labels[i] + 1,
                "bbox": [left, top, wide, high],
                "area": wide * high,
                "iscrowd": int(more[i]) if side else 0,
            }
            if not side:
                one["score"] = more[i]
            if kind == "segm":
                counts = record[f"{side}masks"][i]
                one["segmentation"] = {"size": [height, width], "counts": counts}
                one["area"] = float(run_lengths.area(one["segmentation"]))
            objects.append(one)
    coco = COCO()
    coco.dataset = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": number + 1} for number in range(classes)],
    }
    coco.createIndex()
    return coco
