"""What a batch holds for each task, and that what is said of an image follows it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.core.errors import TesseraError
from models.core.family import Batch, DataSpec
from pipelines.data import annotations, rle, shards
from pipelines.data.annotations import IGNORED, Mask, Objects
from pipelines.data.card import Card, ImageCard
from pipelines.data.images import encode_png
from pipelines.data.loading.loaders import EvalLoader, TrainLoader
from pipelines.data.shards import Packed
from pipelines.interfaces import World

HEIGHT, WIDTH = 20, 30
CLASSES = ("a", "b", "c")
TASKS = ("classification", "detection", "instance_segmentation", "semantic_segmentation", "images")


def box_image(number: int) -> tuple[np.ndarray, list[int]]:
    """A white box in black, and where it is."""
    left, top = 2 + number % 9, 3 + number % 5
    right, bottom = left + 8 + number % 7, top + 6 + number % 4
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[top:bottom, left:right] = 255
    return pixels, [left, top, right, bottom]


def note_of(task: str, number: int) -> tuple[str, bytes] | None:
    pixels, box = box_image(number)
    if task == "classification":
        return "cls", b"%d" % (number % 3)
    if task == "images":
        return None
    if task == "semantic_segmentation":
        return annotations.encode(Mask((pixels > 0).astype(np.uint8) * (1 + number % 2)))
    masks = (rle.write(rle.of_mask(pixels > 0)),) if task == "instance_segmentation" else None
    count = 0 if number == 4 else 1
    return annotations.encode(
        Objects(
            np.array([box] * count, np.float64).reshape(-1, 4),
            np.full(count, number % 3),
            np.full(count, number == 2),
            masks[:count] if masks is not None else None,
        )
    )


def make(folder: Path, task: str, count: int = 10, form: str = "PNG") -> tuple[Path, Card]:
    def packed() -> Any:
        for number in range(count):
            out = io.BytesIO()
            Image.fromarray(box_image(number)[0]).save(out, form, quality=100)
            image = ("png" if form == "PNG" else "jpg", out.getvalue())
            label = number % 3 if task == "classification" else -1
            yield Packed(f"s{number}", image, note_of(task, number), label)

    split = shards.write(folder, "train", packed(), shard_samples=4)
    image = ImageCard(
        channels=1,
        min_height=HEIGHT,
        max_height=HEIGHT,
        min_width=WIDTH,
        max_width=WIDTH,
        mean=(0.5,),
        std=(1,),
    )
    classes = () if task == "images" else CLASSES
    card = Card(name="x", task=task, classes=classes, image=image, splits={"train": split})
    return folder, card.sealed()


def load(folder: Path, card: Card, spec: DataSpec, **options: Any) -> Batch:
    """All samples in their order, as one batch."""
    loader = EvalLoader(folder, card, spec, batch_size=99, world=World(), split="train", **options)
    ((_, batch),) = loader.batches()
    return batch


@pytest.mark.parametrize("loader_workers", [0, 1])
@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_its_fields(
    tmp_path: Path, task: str, cache: str, loader_workers: int
) -> None:
    folder, card = make(tmp_path, task)
    loader = TrainLoader(
        folder,
        card,
        card.spec(),
        batch_size=10,
        seed=0,
        world=World(),
        cache=cache,
        loader_workers=loader_workers,
    )
    more = {
        "classification": {"label"},
        "detection": {"boxes", "labels", "crowd"},
        "instance_segmentation": {"boxes", "labels", "crowd", "masks"},
        "semantic_segmentation": {"mask"},
        "images": set(),
    }[task]
    for epoch in range(2):
        (step,) = loader.epoch(epoch)
        batch = step.batch
        assert set(batch) == {"image", "key", "index", "size", "extent"} | more
        assert batch["size"].tolist() == [[HEIGHT, WIDTH]] * 10
        for row, number in enumerate(batch["index"].tolist()):
            pixels, box = box_image(number)
            assert batch["key"][row] == f"s{number}"
            assert torch.equal(batch["image"][row, 0], torch.from_numpy(pixels))
            if "label" in more:
                assert batch["label"][row] == number % 3
            if "mask" in more:
                expected = torch.from_numpy((pixels > 0) * np.uint8(1 + number % 2))
                assert torch.equal(batch["mask"][row], expected)
            if "boxes" in more:
                assert batch["boxes"][row].tolist() == ([] if number == 4 else [box])
                assert batch["boxes"][row].shape[1:] == (4,)
                assert batch["labels"][row].tolist() == ([] if number == 4 else [number % 3])
                assert batch["crowd"][row].tolist() == ([] if number == 4 else [number == 2])
                kinds = [batch[name][row].dtype for name in ("boxes", "labels", "crowd")]
                assert kinds == [torch.float32, torch.int64, torch.bool]
            if "masks" in more:
                assert batch["masks"][row].shape == (int(number != 4), HEIGHT, WIDTH)
                assert batch["masks"][row].dtype == torch.uint8
                if number != 4:
                    assert torch.equal(batch["masks"][row][0] * 255, batch["image"][row, 0])
    loader.close()


@pytest.mark.parametrize("size", [(20, 30), (12, 16), (40, 60), (26, 18), (9, 41)])
def test_a_crop_takes_all_with_it(tmp_path: Path, size: tuple[int, int]) -> None:
    """Boxes and masks lie where the white pixels are, whichever sides are cut or continued."""
    for task in ("instance_segmentation", "semantic_segmentation"):
        folder, card = make(tmp_path / task, task)
        batch = load(folder, card, card.spec(*size), fit="crop")
        assert batch["image"].shape == (10, 1, *size)
        for number in range(10):
            white = batch["image"][number, 0] == 255
            if task == "semantic_segmentation":
                mask = batch["mask"][number]
                assert torch.equal(mask == 1 + number % 2, white & (mask != IGNORED))
                assert ((mask == IGNORED).sum() > 0) == (size[0] > HEIGHT or size[1] > WIDTH)
            elif number != 4:
                assert torch.equal(batch["masks"][number][0], white.to(torch.uint8))
                rows, columns = np.nonzero(white.numpy())
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert batch["boxes"][number].tolist() == [box]


def test_a_stretch_takes_all_with_it(tmp_path: Path) -> None:
    folder, card = make(tmp_path / "i", "instance_segmentation")
    batch = load(folder, card, card.spec(40, 90))
    for number in (0, 1, 7):
        left, top, right, bottom = box_image(number)[1]
        assert batch["boxes"][number].tolist() == [[left * 3, top * 2, right * 3, bottom * 2]]
        expected = torch.zeros((40, 90), dtype=torch.uint8)
        expected[top * 2 : bottom * 2, left * 3 : right * 3] = 1
        assert torch.equal(batch["masks"][number][0], expected)
    assert batch["size"].tolist() == [[HEIGHT, WIDTH]] * 10
    folder, card = make(tmp_path / "s", "semantic_segmentation")
    batch = load(folder, card, card.spec(40, 90))
    assert batch["mask"][1].max() == 2
    assert (batch["mask"][1] == 2).sum() == 6 * (batch["mask"][1, ::2, ::3] == 2).sum()


def test_an_object_outside_the_crop_is_dropped(tmp_path: Path) -> None:
    folder, card = make(tmp_path, "detection")
    batch = load(folder, card, card.spec(2, 2), fit="crop")
    for number in range(10):
        left, top, right, bottom = box_image(number)[1]
        inside = number != 4 and left < 16 and right > 14 and top < 11 and bottom > 9
        assert len(batch["boxes"][number]) == len(batch["labels"][number]) == inside
        assert len(batch["crowd"][number]) == inside
    counts = [len(boxes) for boxes in batch["boxes"]]
    assert 0 < sum(counts) < 9


def test_jpegs_and_pngs_come_by_the_same_way(tmp_path: Path) -> None:
    """Fast or by Pillow: a flat area is the same in both."""
    spec = None
    found = []
    for form in ("PNG", "JPEG"):
        folder, card = make(tmp_path / form, "images", form=form)
        spec = spec or card.spec(10, 15)
        found.append(load(folder, card, spec, fit="crop")["image"].int())
    assert (found[0] - found[1]).abs().float().mean() < 3


@pytest.mark.fault(26, 27, 28)
@pytest.mark.parametrize(
    ("note", "says"),
    [
        (b'{"boxes":[[0,0,NaN,4]],"crowd":[0],"labels":[0]}', "sample s0"),
        (b'{"boxes":[[0,0,400,4]],"crowd":[0],"labels":[0]}', "sample s0"),
        (b'{"boxes":[[0,0,4,4]],"crowd":[0],"labels":[3]}', "sample s0"),
        (b'{"boxes":[[0,0,4,4]],"crowd":[0],"labels":[0,1]}', "sample s0"),
        (b"[" * 200_000, "sample s0"),
        (b"", "sample s0"),
    ],
    ids=["nan", "outside", "class", "counts", "deep", "empty"],
)
def test_a_forged_annotation_is_refused_with_its_key(
    tmp_path: Path, note: bytes, says: str
) -> None:
    folder, card = make(tmp_path / "good", "detection", count=1)
    load(folder, card, card.spec())  # the control
    image = ("png", encode_png(box_image(0)[0]))
    split = shards.write(tmp_path / "bad", "train", [Packed("s0", image, ("json", note))])
    bad = card.model_copy(update={"splits": {"train": split}}).sealed()
    with pytest.raises(TesseraError, match=says):
        load(tmp_path / "bad", bad, bad.spec())


@pytest.mark.fault(27, 30)
def test_a_label_outside_the_classes_is_refused_with_its_key(tmp_path: Path) -> None:
    folder, card = make(tmp_path, "classification")
    few = card.model_copy(update={"classes": ("a", "b")}).sealed()
    with pytest.raises(TesseraError, match=r"sample s2 has the class 2"):
        load(folder, few, few.spec())


@pytest.mark.fault(25)
def test_an_image_that_can_t_be_read_is_named(tmp_path: Path) -> None:
    _, card = make(tmp_path, "images", count=1)
    split = shards.write(tmp_path / "bad", "train", [Packed("s/1", ("jpg", b"<html>"))])
    bad = card.model_copy(update={"splits": {"train": split}}).sealed()
    with pytest.raises(TesseraError, match="the image of sample s/1 is no image"):
        load(tmp_path / "bad", bad, bad.spec())
