"""Unusual but valid data can be trained on.

Images without objects, a single class, a single image, only crowds, masks with a single labelled
pixel. Losses and metrics stay finite, only classes in the data have metrics, and no rank waits for
one without objects."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gloo_ranks
import numpy as np
import pytest
import rank_work
from packed_sets import Sample, pack_set
from PIL import Image

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.data import rle
from pipelines.data.annotations import IGNORED, Mask, Objects
from pipelines.interfaces import World
from pipelines.recipe import Recipe
from pipelines.training import checkpoints, sample_log

WORK = Path(__file__).parents[1] / "support" / "rank_work.py"
SIDE = 48
CLASSES = ("ant", "bee", "cat")
DETECTORS = ("yolo", "faster_rcnn", "mask_rcnn")


def image(number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)


def scene(number: int, content: str) -> Sample:
    """Dark noise with a bright rectangle for each letter: lower case for an object of a class,
    upper case for a crowd of it. "" is an image without objects."""
    pixels, boxes, masks = image(number), [], []
    for position, letter in enumerate(content):
        left, top = 3 + 15 * position, 6 + 5 * (number % 3)
        boxes.append([left, top, left + 12, top + 17])
        pixels[top : top + 17, left : left + 12, "abc".index(letter.lower())] = 255
        masks.append(np.zeros((SIDE, SIDE), np.uint8))
        masks[-1][top : top + 17, left : left + 12] = 1
    objects = Objects(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(["abc".index(letter.lower()) for letter in content], np.int64),
        np.array([letter.isupper() for letter in content], bool),
        tuple(rle.write(rle.of_mask(mask)) for mask in masks),
    )
    return f"s{number}", Image.fromarray(pixels), objects


def areas(number: int, content: str) -> Sample:
    """One letter for the class of the left half and one for the right, "." for ignored. With "o",
    one pixel is a bee and all others are ignored."""
    pixels, mask = image(number), np.full((SIDE, SIDE), IGNORED, np.uint8)
    if content == "o":
        mask[40, 7] = 1
    for half, letter in enumerate(content if content != "o" else ""):
        columns = slice(half * SIDE // 2, (half + 1) * SIDE // 2)
        if letter != ".":
            mask[:, columns] = "abc".index(letter)
            pixels[:, columns, "abc".index(letter)] += 160
    return f"s{number}", Image.fromarray(pixels), Mask(mask)


def labelled(number: int, content: str) -> Sample:
    """An image of one class; "" for an image without a label."""
    pixels = image(number)
    if content:
        pixels[10:30, 10:30, "abc".index(content)] = 255
    return f"s{number}", Image.fromarray(pixels), "abc".index(content) if content else None


MAKERS = {
    "classification": labelled,
    "images": labelled,
    "instance_segmentation": scene,
    "semantic_segmentation": areas,
}


def pack(
    folder: Path,
    kind: str,
    train: Sequence[str],
    val: Sequence[str],
    *,
    classes: int = 3,
    shard_samples: int = 40,
) -> Path:
    make = MAKERS[kind]
    splits = {
        "train": [make(number, content) for number, content in enumerate(train)],
        "val": [make(100 + number, content) for number, content in enumerate(val)],
    }
    names = () if kind == "images" else CLASSES[:classes]
    pack_set(folder, kind, splits, names, shard_samples=shard_samples)
    return folder


def small(family: str, data: Path, **changes: Any) -> Recipe:
    return recipes.start(family, "tiny").with_overrides(
        {
            "data.path": str(data),
            "data.digest": cards.read(data).digest,
            "train.epochs": 1,
            "train.batch_size": 4,
            "train.precision": "fp32",
            "train.log_every_steps": 1,
            **changes,
        }
    )


def fit(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Trains in this process, and checks that all losses and metrics are finite."""
    folder.mkdir(parents=True, exist_ok=True)
    payload = {"recipe": recipe.to_json(), "run_dir": str(folder)}
    result = rank_work.train(World(), payload)
    assert result["losses"]
    assert all(map(math.isfinite, [*result["losses"], *result["metrics"].values()]))
    return result


# ── objects ───────────────────────────────────────────────────────────────────────────────────

OBJECTS: dict[str, tuple[list[str], list[str], int]] = {
    "no objects": (["", "", "", ""], ["", ""], 3),
    "no objects in val": (["a", "ab", "", "b"], ["", ""], 3),
    "no objects in train": (["", "", "", ""], ["a", "ab"], 3),
    "one class": (["a", "aa", "", "a"], ["a", "aa"], 1),
    "one image in val": (["a", "ab", "", "b"], ["ab"], 3),
    "one image per split": (["ab"], ["ab"], 3),
    "a class missing in train": (["a", "aa", "", "a"], ["ac", "c"], 3),
    "a class without objects": (["a", "ab", "", "b"], ["a", "b"], 3),
    "only crowds": (["A", "AB", "B", "A"], ["A", "BB"], 3),
    "only crowds in val": (["a", "ab", "", "b"], ["A", "BB"], 3),
}
"""The contents of the images of train and val, and the number of classes."""
CASES = [
    *((family, name) for family in ("yolo", "mask_rcnn") for name in OBJECTS),
    *(("faster_rcnn", name) for name in ("no objects", "only crowds", "one class")),
]
"""Faster R-CNN shares its code with Mask R-CNN: three cases are enough."""


@pytest.mark.fault(29, 30)
@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{f}, {n}" for f, n in CASES])
def test_unusual_object_data_can_be_trained_on(family: str, name: str, tmp_path: Path) -> None:
    train, val, classes = OBJECTS[name]
    data = pack(tmp_path / "set", "instance_segmentation", train, val, classes=classes)
    metrics = fit(small(family, data), tmp_path / "run")["metrics"]
    there = sorted({CLASSES["abc".index(letter)] for letter in "".join(val) if letter.islower()})
    kinds = ["mask_map", "box_map"] if family == "mask_rcnn" else ["map"]
    for kind in kinds:
        counted = [n.rpartition("/")[2] for n in metrics if n.startswith(f"{kind}/")]
        assert sorted(counted) == there, "only classes in val have a metric"
        assert 0 <= metrics[kind] <= 1
        assert there or not metrics[kind]


@pytest.mark.fault(15)
@pytest.mark.parametrize("family", DETECTORS)
def test_one_image_with_a_single_grid_cell_can_be_trained_on(family: str, tmp_path: Path) -> None:
    """Batch norm needs more than one value for its deviation."""
    data = pack(tmp_path / "set", "instance_segmentation", ["a"], ["a"])
    fit(small(family, data, **{"data.height": 8, "data.width": 8}), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.fault(15, 29)
@pytest.mark.parametrize("family", ["yolo", "mask_rcnn"])
def test_a_rank_without_objects_takes_every_step(family: str, tmp_path: Path) -> None:
    """The rows of a batch are sorted by shard: the first rank has the two images without objects in
    every step."""
    train, val = ["", "", "ab", "b"], ["ab", "", "A"]
    data = pack(tmp_path / "set", "instance_segmentation", train, val, shard_samples=2)
    recipe = small(family, data, **{"data.sample_log": True, "train.epochs": 2})
    run = tmp_path / "run"
    payload = {"recipe": recipe.to_json(), "run_dir": str(run)}
    result, _ = gloo_ranks.run(WORK, "train", 2, payload)
    assert "error" not in result, result
    for rank, samples in enumerate(([0, 1], [2, 3])):
        lines = (run / sample_log.FOLDER / f"0000-{rank:04d}.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines[1:]]
        assert [sorted(step["samples"]) for step in steps] == [samples, samples]
    assert len(result["losses"]) == 2
    assert all(map(math.isfinite, result["losses"]))
    # Two ranks, one of them without a batch, compute the same metrics as one rank.
    digest = checkpoints.write_model(run / "checkpoints" / result["checkpoint"], tmp_path / "model")
    payload = {
        "model": str(tmp_path / "model"),
        "digest": digest,
        "data": str(data),
        "split": "val",
    }
    assert rank_work.evaluate(World(), payload)["metrics"] == result["metrics"]


# ── pixels ────────────────────────────────────────────────────────────────────────────────────

AREAS: dict[str, tuple[list[str], list[str], int]] = {
    "one labelled pixel": (["o", "o", "o", "o"], ["o"], 3),
    "half of the pixels ignored": (["a.", ".b", "a.", "o"], ["a.", ".c"], 3),
    "one class": (["aa", "a.", "aa", ".a"], ["aa"], 1),
    "one image per split": (["ab"], ["ab"], 3),
    "a class missing in train": (["ab", "aa", "bb", "ab"], ["ac", "cc"], 3),
    "a class missing in val": (["ab", "bc", "ca", "ab"], ["aa"], 3),
}


@pytest.mark.fault(30)
@pytest.mark.parametrize("patch", [0, 16], ids=["whole", "patches"])
@pytest.mark.parametrize("name", AREAS)
def test_unusual_masks_can_be_trained_on(name: str, patch: int, tmp_path: Path) -> None:
    """Most patches of an image with one labelled pixel have none."""
    train, val, classes = AREAS[name]
    data = pack(tmp_path / "set", "semantic_segmentation", train, val, classes=classes)
    metrics = fit(small("unet", data, **{"augment.patch": patch}), tmp_path / "run")["metrics"]
    assert all(0 <= value <= 1 for value in metrics.values())
    there = {
        CLASSES["abc".index(letter)] for letter in "".join(val).replace("o", "b") if letter != "."
    }
    assert {n.removeprefix("iou/") for n in metrics if n.startswith("iou/")} >= there
    if classes == 1:
        assert metrics["miou"] == metrics["dice"] == metrics["pixel_accuracy"] == 1
    if "o" in val:
        assert metrics["pixel_accuracy"] in (0, 1)


def test_validation_without_a_labelled_pixel_is_an_error(tmp_path: Path) -> None:
    """The network sees only the centre of the image, where no pixel is labelled."""
    data = pack(tmp_path / "set", "semantic_segmentation", ["ab", "ab"], ["o"])
    recipe = small("unet", data, **{"data.fit": "crop", "data.height": 16, "data.width": 16})
    with pytest.raises(TesseraError, match="no pixel of these images has a class"):
        fit(recipe, tmp_path / "run")


# ── whole images ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("train", "val", "classes"),
    [("abca", "b", 3), ("a", "a", 3), ("aaaa", "aa", 1), ("aabb", "cc", 3)],
    ids=["one image in val", "one image per split", "one class", "a class missing in train"],
)
def test_unusual_classification_data_can_be_trained_on(
    train: str, val: str, classes: int, tmp_path: Path
) -> None:
    data = pack(tmp_path / "set", "classification", train, val, classes=classes)
    metrics = fit(small("cnn", data), tmp_path / "run")["metrics"]
    assert 0 <= metrics["accuracy"] <= 1
    assert classes > 1 or metrics["accuracy"] == 1


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("abca", "b", "no two of one class"),
        ("abca", "bb", "no two of different classes"),
        ("aaaa", "ab", "all training images are of one class"),
    ],
)
def test_verification_without_two_images_to_compare_is_refused(
    train: str, val: str, message: str, tmp_path: Path
) -> None:
    data = pack(tmp_path / "set", "classification", train, val)
    with pytest.raises(TesseraError, match=message):
        fit(small("embedding", data), tmp_path / "run")


@pytest.mark.parametrize("kind", ["images", "semantic_segmentation"])
@pytest.mark.parametrize("family", ["autoencoder", "super_resolution"])
@pytest.mark.parametrize("even", [False, True], ids=["noise", "one grey"])
def test_a_single_image_is_enough_for_tasks_without_labels(
    family: str, kind: str, even: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if all of its pixels are the same."""
    if even:
        monkeypatch.setitem(
            globals(), "image", lambda number: np.full((SIDE, SIDE, 3), 7, np.uint8)
        )
    content = "" if kind == "images" else "o"
    data = pack(tmp_path / "set", kind, [content], [content])
    fit(small(family, data), tmp_path / "run")
