"""Average precision of found objects, as COCO defines it.

In: a record an image, with what was found and what is there. Out: exact figures. The counting is
pycocotools' (Lin et al., Microsoft COCO, 2014, and its reference code). Must not know any network.

    N objects found in an image, M objects in truth, H height, W width
    T thresholds of the overlap, R levels of the recall, K classes

A record has `size` (H, W); of what was found `boxes` float (N, 4): left, top, right, bottom, `scores`
(N,) and `labels` (N,); of the truth `true_boxes` (M, 4), `true_labels` (M,) and `true_crowd` (M,).
To compare masks it also has `masks` and `true_masks`, lists of N and M run lengths: the bytes that
`pycocotools.mask.encode` makes.
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
MOST_FOUND = 100
"""Of an image only the so many most certain objects of a class count, as in COCO."""
NAMED_CLASSES = 50
"""So many classes get a figure of their own."""
_EVERY_SIZE = ((0.0, 1e10),)


def metrics(
    records: Sequence[Record],
    classes: Sequence[str],
    kind: Kind = "bbox",
    *,
    most_found: int = MOST_FOUND,
) -> dict[str, float]:
    """`map`, the mean of the average precision over overlaps of 0.5, 0.55 … 0.95 and over the
    classes that occur in truth; `map50` and `map75` at one overlap; `map/CLASS` for each of these
    classes, of the first 50. All are 0 where there is no truth.

    `most_found`: objects of an image and class that count, the most certain first. A crowd is
    neither missed nor are objects in it wrong. Of equal scores the image that comes first counts
    first.
    """
    return bootstrap_metrics(records, classes, kind, most_found=most_found)(range(len(records)))


def bootstrap_metrics(
    records: Sequence[Record],
    classes: Sequence[str],
    kind: Kind = "bbox",
    *,
    most_found: int = MOST_FOUND,
) -> Callable[[Sequence[int]], dict[str, float]]:
    """Makes `metrics` of any of the images, by their places in `records`. Answers and truths are
    compared once, here: a selection only counts anew."""
    evaluation = _evaluate(records, len(classes), kind, most_found)
    # for each class, one area and each image: a dict, or None where there is nothing
    compared, count = evaluation.evalImgs, max(len(records), 1)
    names = metric_names(classes)

    def of(places: Sequence[int]) -> dict[str, float]:
        evaluation.params.imgIds = evaluation._paramsEval.imgIds = list(range(len(places)))
        evaluation.evalImgs = [
            compared[start + place] for start in range(0, len(compared), count) for place in places
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
        return _metrics(evaluation, names)

    return of


def _metrics(evaluation: Any, names: Sequence[str]) -> dict[str, float]:
    # (T, R, K): the precision, -1 for a class that doesn't occur
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    overlaps = evaluation.params.iouThrs
    found = {
        "map": _mean(precision),
        "map50": _mean(precision[np.isclose(overlaps, 0.5)]),
        "map75": _mean(precision[np.isclose(overlaps, 0.75)]),
    }
    occurring = [k for k in range(len(names)) if (precision[:, :, k] >= 0).any()]
    for k in occurring[:NAMED_CLASSES]:
        found[f"map/{names[k]}"] = _mean(precision[:, :, k])
    return found


def curves(
    records: Sequence[Record], classes: Sequence[str], kind: Kind = "bbox", *, most: int = 10
) -> dict[str, tuple[list[float], list[float]]]:
    """Class -> (recalls, precisions) at an overlap of 0.5, of the first `most` that occur."""
    evaluation = _evaluate(records, len(classes), kind, MOST_FOUND)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, 0]
    recalls = evaluation.params.recThrs.tolist()
    names = metric_names(classes)
    occurring = [k for k in range(len(classes)) if (precision[:, k] >= 0).any()]
    return {names[k]: (recalls, precision[:, k].tolist()) for k in occurring[:most]}


def metric_names(classes: Iterable[str]) -> list[str]:
    """A name for each class that can stand in the name of a figure: letters, digits, `_`, `-` and
    single spaces; no two are the same."""
    names: list[str] = []
    taken: set[str] = set()
    for name in classes:
        plain = re.sub(r"[^A-Za-z0-9_ -]", "_", " ".join(name.split()))[:80].strip() or "_"
        tried, number = plain, 1
        while tried.lower() in taken:
            number += 1
            tried = f"{plain}-{number}"
        taken.add(tried.lower())
        names.append(tried)
    return names


def _mean(precision: np.ndarray[Any, Any]) -> float:
    known = precision[precision >= 0]
    return float(known.mean()) if known.size else 0.0


def _evaluate(records: Sequence[Record], classes: int, kind: Kind, most_found: int) -> Any:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        truth = _as_coco(records, classes, kind, "true_")
        answers = _as_coco(records, classes, kind, "")
        evaluation = COCOeval(truth, answers, kind)
        evaluation.params.imgIds = list(range(1, len(records) + 1))
        evaluation.params.catIds = list(range(1, classes + 1))
        evaluation.params.maxDets = [most_found]
        evaluation.params.areaRng = [list(span) for span in _EVERY_SIZE]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
    return evaluation


def _as_coco(records: Sequence[Record], classes: int, kind: Kind, side: str) -> Any:
    """The objects of one side as pycocotools has them. Ids begin with 1: it takes 0 for none."""
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
        for place, ((left, top), (wide, high)) in enumerate(zip(corners, sizes)):
            one: dict[str, Any] = {
                "id": len(objects) + 1,
                "image_id": image_id,
                "category_id": labels[place] + 1,
                "bbox": [left, top, wide, high],
                "area": wide * high,
                "iscrowd": int(more[place]) if side else 0,
            }
            if not side:
                one["score"] = more[place]
            if kind == "segm":
                counts = record[f"{side}masks"][place]
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
