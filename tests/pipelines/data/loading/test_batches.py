"""The fields of a batch for each task, and errors that name the sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from white_boxes import HEIGHT, TASKS, WIDTH, box_image, load, make

from models.core.errors import TesseraError
from pipelines.data import shards
from pipelines.data.images import encode_png
from pipelines.data.loading.loaders import TrainLoader
from pipelines.data.shards import Packed
from pipelines.interfaces import World


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


def test_jpegs_and_pngs_have_the_same_pixels(tmp_path: Path) -> None:
    """With the fast decoder and with Pillow: flat areas are equal."""
    spec = None
    images = []
    for form in ("PNG", "JPEG"):
        folder, card = make(tmp_path / form, "images", form=form)
        spec = spec or card.spec(10, 15)
        images.append(load(folder, card, spec, fit="crop")["image"].int())
    assert (images[0] - images[1]).abs().float().mean() < 3


@pytest.mark.fault(26, 27, 28)
@pytest.mark.parametrize(
    ("annotation", "message"),
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
def test_an_invalid_annotation_names_its_sample(
    tmp_path: Path, annotation: bytes, message: str
) -> None:
    folder, card = make(tmp_path / "good", "detection", count=1)
    load(folder, card, card.spec())  # the control
    image = ("png", encode_png(box_image(0)[0]))
    split = shards.write(tmp_path / "bad", "train", [Packed("s0", image, ("json", annotation))])
    bad = card.model_copy(update={"splits": {"train": split}}).sealed()
    with pytest.raises(TesseraError, match=message):
        load(tmp_path / "bad", bad, bad.spec())


@pytest.mark.fault(27, 30)
def test_a_label_outside_the_classes_names_its_sample(tmp_path: Path) -> None:
    folder, card = make(tmp_path, "classification")
    few = card.model_copy(update={"classes": ("a", "b")}).sealed()
    with pytest.raises(TesseraError, match=r"sample s2 has the class 2"):
        load(folder, few, few.spec())


@pytest.mark.fault(25)
def test_an_unreadable_image_names_its_sample(tmp_path: Path) -> None:
    _, card = make(tmp_path, "images", count=1)
    split = shards.write(tmp_path / "bad", "train", [Packed("s/1", ("jpg", b"<html>"))])
    bad = card.model_copy(update={"splits": {"train": split}}).sealed()
    with pytest.raises(TesseraError, match="the image of sample s/1 is not an image"):
        load(tmp_path / "bad", bad, bad.spec())
