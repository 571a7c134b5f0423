"""A data spec and a batch for each kind of data, for tests that run over every family."""

from __future__ import annotations

import torch
from torch import Tensor

from models.core.family import Batch, BatchRng, DataSpec, Family
from pipelines import recipe as recipes

CLASSES = ("cat", "dog", "owl", "newt")
SPECS = {
    "classification": DataSpec(
        "classification", 3, 16, 16, CLASSES, (0.5, 0.4, 0.3), (0.3, 0.3, 0.3), (9, 8, 7, 2)
    ),
    "detection": DataSpec(
        "detection", 3, 64, 64, CLASSES[:3], (0.5, 0.4, 0.3), (0.3, 0.3, 0.3), (9, 8, 7)
    ),
    "instance_segmentation": DataSpec(
        "instance_segmentation", 3, 64, 64, CLASSES[:3], (0.5, 0.4, 0.3), (0.3, 0.3, 0.3), (9, 8, 7)
    ),
    "semantic_segmentation": DataSpec(
        "semantic_segmentation", 3, 32, 32, CLASSES[:3], (0.5, 0.4, 0.3), (0.3, 0.3, 0.3), (9, 8, 1)
    ),
    "images": DataSpec("images", 3, 16, 16, (), (0.5, 0.4, 0.3), (0.3, 0.3, 0.3)),
}
"""By `Task.reads`."""


def spec(family: Family) -> DataSpec:
    return SPECS[family.task.reads]


def raw_batch(family: Family, count: int = 8, seed: int = 0) -> Batch:
    """A batch as the loader returns it, with annotations for the task of the family."""
    return read_batch(family.task.reads, count, seed)


def read_batch(reads: str, count: int, seed: int) -> Batch:
    """A batch of that kind of data. The annotated objects and areas are visible in the images."""
    generator = torch.Generator().manual_seed(seed)
    data = SPECS[reads]
    shape = (count, *data.shape)
    sizes = torch.tensor([[data.height, data.width]]).repeat(count, 1)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    batch: Batch = {
        "image": images,
        "key": [f"sample-{i}" for i in range(count)],
        "index": torch.arange(count),
        "size": sizes,
        "extent": sizes.clone(),
    }
    if data.task == "classification":
        batch["label"] = torch.arange(count) % len(CLASSES)
    elif data.task in ("detection", "instance_segmentation"):
        batch.update(_objects(batch["image"], masks=data.task == "instance_segmentation"))
    elif data.task == "semantic_segmentation":
        batch["mask"] = _classes(batch["image"])
    return batch


def _objects(images: Tensor, *, masks: bool) -> dict[str, list[Tensor]]:
    """Paints bright rectangles, one colour per class. Every fourth image has none; one image has a
    crowd next to its object."""
    fields: dict[str, list[Tensor]] = {"boxes": [], "labels": [], "crowd": []}
    if masks:
        fields["masks"] = []
    height, width = images.shape[-2:]
    images //= 4
    for number, image in enumerate(images):
        boxes, labels = [], []
        for position in range(number % 4):
            left, top = 2 + 20 * position, 4 + 7 * ((number + position) % 4)
            box = (left, top, left + 17, top + 21 + 3 * position)
            label = (number + position) % 3
            image[label, box[1] : box[3], box[0] : box[2]] = 255
            boxes.append(box)
            labels.append(label)
        crowd = torch.zeros(len(boxes), dtype=torch.bool)
        if number == 2:
            crowd[-1] = True
        fields["boxes"].append(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        fields["labels"].append(torch.tensor(labels, dtype=torch.int64))
        fields["crowd"].append(crowd)
        if masks:
            pixels = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
            for mask, (left, top, right, bottom) in zip(pixels, boxes):
                mask[top:bottom, left:right] = 1
            fields["masks"].append(pixels)
    return fields


def _classes(images: Tensor) -> Tensor:
    """Paints a rectangle for each class except the first; a strip at the right is ignored."""
    mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.uint8)
    images //= 4
    for number, (image, pixels) in enumerate(zip(images, mask)):
        for label in (1, 2):
            top = 3 + 13 * (label - 1) + number % 4
            image[label, top : top + 10, 5:25] = 255
            pixels[top : top + 10, 5:25] = label
        pixels[:, -2:] = 255
    return mask


def judge(images: Tensor) -> tuple[Tensor, Tensor]:
    """A stand-in for a judge: returns features (B, 12) and probabilities (B, 4)."""
    features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
    return features, (features[:, :4] * 4).softmax(1)


def train_batch(family: Family, count: int = 8, seed: int = 0) -> Batch:
    """`raw_batch` after the transform of the family, without random augmentation."""
    settings = recipes.start(family.name, "tiny").augment_settings()
    transform = family.augment(settings, spec(family), train=False)
    return transform(raw_batch(family, count, seed), BatchRng(seed, count, slice(0, count)))


def tiny(family: Family, seed: int = 0) -> torch.nn.Module:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would take milliseconds
    return family.build(family.variants["tiny"], spec(family))
