"""Small sources of each kind of data, from which a family can learn.

In: a folder. Out: folders with images by class, COCO with masks, or masks as PNG. The images are
those of `examples.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import examples
import numpy as np
from PIL import Image
from torch import Tensor

from models.core.family import Batch
from pipelines.data import rle

COUNTS = {"train": 24, "val": 8, "test": 8}


def _batch(reads: str, split: str) -> Batch:
    return examples.read_batch(reads, COUNTS[split], seed=list(COUNTS).index(split))


def _save(image: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def classification(folder: Path) -> Path:
    for split in COUNTS:
        batch, data = _batch("classification", split), examples.SPECS["classification"]
        for number, (image, label) in enumerate(zip(batch["image"], batch["label"].tolist())):
            image[label % 3] = 255 - image[label % 3] // 4
            _save(image, folder / split / data.classes[label] / f"{number}.png")
    return folder


def instance_segmentation(folder: Path) -> Path:
    data = examples.SPECS["instance_segmentation"]
    for split in COUNTS:
        batch = _batch("instance_segmentation", split)
        images, annotations = [], []
        for number, image in enumerate(batch["image"]):
            name = f"{number}.png"
            _save(image, folder / split / name)
            images.append(
                {"id": number, "file_name": name, "height": data.height, "width": data.width}
            )
            for box, label, mask in zip(
                batch["boxes"][number], batch["labels"][number], batch["masks"][number]
            ):
                left, top, right, bottom = box.tolist()
                counts = rle.write(rle.of_mask(mask.numpy())).decode()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": int(label) + 1,
                        "bbox": [left, top, right - left, bottom - top],
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": {"size": [data.height, data.width], "counts": counts},
                    }
                )
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(data.classes)]
        path = folder / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
    return folder


def semantic_segmentation(folder: Path) -> Path:
    for split in COUNTS:
        batch = _batch("semantic_segmentation", split)
        for number, (image, mask) in enumerate(zip(batch["image"], batch["mask"])):
            _save(image, folder / split / "images" / f"{number}.png")
            path = folder / split / "masks" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(mask)).save(path)
    return folder


SOURCES = {
    "classification": classification,
    "instance_segmentation": instance_segmentation,
    "semantic_segmentation": semantic_segmentation,
}
READ_FROM = {
    "classification": "classification",
    "images": "classification",
    "detection": "instance_segmentation",
    "instance_segmentation": "instance_segmentation",
    "semantic_segmentation": "semantic_segmentation",
}
"""The source from which the data of a task are packed."""
