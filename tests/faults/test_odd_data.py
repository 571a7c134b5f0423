"""Data that are odd and legal train: nothing to be seen in an image, one class, one image, crowds alone,
hardly a pixel with a class. Losses and figures stay finite, figures are those of what is there, and no
rank waits for one that has no object."""

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
from packed_sets import Given, pack_set
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
FINDERS = ("yolo", "faster_rcnn", "mask_rcnn")


def image(number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)


def scene(number: int, content: str) -> Given:
    """Dark noise with a bright square for each letter, a small one for a class and a capital for a
    crowd of it; "" is an image of nothing."""
    pixels, boxes, masks = image(number), [], []
    for place, letter in enumerate(content):
        left, top = 3 + 15 * place, 6 + 5 * (number % 3)
        boxes.append([left, top, left + 12, top + 17])
        pixels[top : top + 17, left : left + 12, "abc".index(letter.lower())] = 255
        masks.append(np.zeros((SIDE, SIDE), np.uint8))
        masks[-1][top : top + 17, left : left + 12] = 1
    found = Objects(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(["abc".index(letter.lower()) for letter in content], np.int64),
        np.array([letter.isupper() for letter in content], bool),
        tuple(rle.write(rle.of_mask(mask)) for mask in masks),
    )
    return f"s{number}", Image.fromarray(pixels), found


def areas(number: int, content: str) -> Given:
    """The class of the left half and of the right, "." for none; of "o" one pixel is a bee's, and
    the others are nobody's."""
    pixels, mask = image(number), np.full((SIDE, SIDE), IGNORED, np.uint8)
    if content == "o":
        mask[40, 7] = 1
    for half, letter in enumerate(content if content != "o" else ""):
        columns = slice(half * SIDE // 2, (half + 1) * SIDE // 2)
        if letter != ".":
            mask[:, columns] = "abc".index(letter)
            pixels[:, columns, "abc".index(letter)] += 160
    return f"s{number}", Image.fromarray(pixels), Mask(mask)


def labelled(number: int, content: str) -> Given:
    """An image of one class; of "" only the image."""
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
    """Trains here; all losses and figures are finite."""
    folder.mkdir(parents=True, exist_ok=True)
    payload = {"recipe": recipe.to_json(), "run_dir": str(folder)}
    found = rank_work.train(World(), payload)
    assert found["losses"]
    assert all(map(math.isfinite, [*found["losses"], *found["metrics"].values()]))
    return found


# ── objects ───────────────────────────────────────────────────────────────────────────────────

OBJECTS: dict[str, tuple[list[str], list[str], int]] = {
    "no object at all": (["", "", "", ""], ["", ""], 3),
    "no object in val": (["a", "ab", "", "b"], ["", ""], 3),
    "no object in train": (["", "", "", ""], ["a", "ab"], 3),
    "one class": (["a", "aa", "", "a"], ["a", "aa"], 1),
    "one image in val": (["a", "ab", "", "b"], ["ab"], 3),
    "one image in all": (["ab"], ["ab"], 3),
    "a class that train lacks": (["a", "aa", "", "a"], ["ac", "c"], 3),
    "a class that is nowhere": (["a", "ab", "", "b"], ["a", "b"], 3),
    "crowds alone": (["A", "AB", "B", "A"], ["A", "BB"], 3),
    "crowds alone in val": (["a", "ab", "", "b"], ["A", "BB"], 3),
}
"""What the images of train and val show, and how many classes there are."""
FINDINGS = [
    *((family, name) for family in ("yolo", "mask_rcnn") for name in OBJECTS),
    *(("faster_rcnn", name) for name in ("no object at all", "crowds alone", "one class")),
]
"""Faster R-CNN is Mask R-CNN but for the masks."""


@pytest.mark.fault(29, 30)
@pytest.mark.parametrize(("family", "name"), FINDINGS, ids=[f"{f}, {n}" for f, n in FINDINGS])
def test_odd_sets_of_objects_train(family: str, name: str, tmp_path: Path) -> None:
    train, val, classes = OBJECTS[name]
    data = pack(tmp_path / "set", "instance_segmentation", train, val, classes=classes)
    metrics = fit(small(family, data), tmp_path / "run")["metrics"]
    there = sorted({CLASSES["abc".index(letter)] for letter in "".join(val) if letter.islower()})
    kinds = ["mask_map", "box_map"] if family == "mask_rcnn" else ["map"]
    for kind in kinds:
        counted = [n.rpartition("/")[2] for n in metrics if n.startswith(f"{kind}/")]
        assert sorted(counted) == there, "only what is there has a figure"
        assert 0 <= metrics[kind] <= 1
        assert there or not metrics[kind]


@pytest.mark.fault(15)
@pytest.mark.parametrize("family", FINDERS)
def test_one_image_of_a_single_cell_trains(family: str, tmp_path: Path) -> None:
    """A norm over the batch has no deviation of one value."""
    data = pack(tmp_path / "set", "instance_segmentation", ["a"], ["a"])
    fit(small(family, data, **{"data.height": 8, "data.width": 8}), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.fault(15, 29)
@pytest.mark.parametrize("family", ["yolo", "mask_rcnn"])
def test_a_rank_without_an_object_goes_on(family: str, tmp_path: Path) -> None:
    """The rows of a batch are sorted by shard: the first rank has the two images without objects in
    every step."""
    train, val = ["", "", "ab", "b"], ["ab", "", "A"]
    data = pack(tmp_path / "set", "instance_segmentation", train, val, shard_samples=2)
    recipe = small(family, data, **{"data.sample_log": True, "train.epochs": 2})
    run = tmp_path / "run"
    payload = {"recipe": recipe.to_json(), "run_dir": str(run)}
    found, _ = gloo_ranks.run(WORK, "train", 2, payload)
    assert "error" not in found, found
    for rank, samples in enumerate(([0, 1], [2, 3])):
        lines = (run / sample_log.FOLDER / f"0000-{rank:04d}.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines[1:]]
        assert [sorted(step["samples"]) for step in steps] == [samples, samples]
    assert len(found["losses"]) == 2
    assert all(map(math.isfinite, found["losses"]))
    # What two ranks found, one of them without a batch, is what one finds.
    digest = checkpoints.write_model(run / "checkpoints" / found["checkpoint"], tmp_path / "model")
    asked = {"model": str(tmp_path / "model"), "digest": digest, "data": str(data), "split": "val"}
    assert rank_work.evaluate(World(), asked)["metrics"] == found["metrics"]


# ── pixels ────────────────────────────────────────────────────────────────────────────────────

AREAS: dict[str, tuple[list[str], list[str], int]] = {
    "a pixel with a class": (["o", "o", "o", "o"], ["o"], 3),
    "half without a class": (["a.", ".b", "a.", "o"], ["a.", ".c"], 3),
    "one class": (["aa", "a.", "aa", ".a"], ["aa"], 1),
    "one image in all": (["ab"], ["ab"], 3),
    "a class that train lacks": (["ab", "aa", "bb", "ab"], ["ac", "cc"], 3),
    "a class that val lacks": (["ab", "bc", "ca", "ab"], ["aa"], 3),
}


@pytest.mark.fault(30)
@pytest.mark.parametrize("patch", [0, 16], ids=["whole", "patches"])
@pytest.mark.parametrize("name", AREAS)
def test_odd_masks_train(name: str, patch: int, tmp_path: Path) -> None:
    """Of most patches of an image with one known pixel no pixel is known."""
    train, val, classes = AREAS[name]
    data = pack(tmp_path / "set", "semantic_segmentation", train, val, classes=classes)
    found = fit(small("unet", data, **{"augment.patch": patch}), tmp_path / "run")
    metrics = found["metrics"]
    assert all(0 <= value <= 1 for value in metrics.values())
    there = {
        CLASSES["abc".index(letter)] for letter in "".join(val).replace("o", "b") if letter != "."
    }
    assert {n.removeprefix("iou/") for n in metrics if n.startswith("iou/")} >= there
    if classes == 1:
        assert metrics["miou"] == metrics["dice"] == metrics["pixel_accuracy"] == 1
    if "o" in val:
        assert metrics["pixel_accuracy"] in (0, 1)


def test_where_no_known_pixel_is_left_it_is_said(tmp_path: Path) -> None:
    """The middle of the picture, which is all that the network sees, has none."""
    data = pack(tmp_path / "set", "semantic_segmentation", ["ab", "ab"], ["o"])
    recipe = small("unet", data, **{"data.fit": "crop", "data.height": 16, "data.width": 16})
    with pytest.raises(TesseraError, match="no pixel of these images has a class"):
        fit(recipe, tmp_path / "run")


# ── whole images ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("train", "val", "classes"),
    [("abca", "b", 3), ("a", "a", 3), ("aaaa", "aa", 1), ("aabb", "cc", 3)],
    ids=["one image in val", "one image in all", "one class", "a class that train lacks"],
)
def test_odd_sets_of_classes_train(train: str, val: str, classes: int, tmp_path: Path) -> None:
    data = pack(tmp_path / "set", "classification", train, val, classes=classes)
    metrics = fit(small("cnn", data), tmp_path / "run")["metrics"]
    assert 0 <= metrics["accuracy"] <= 1
    assert classes > 1 or metrics["accuracy"] == 1


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("train", "val", "says"),
    [
        ("abca", "b", "no two of one class"),
        ("abca", "bb", "no two of different classes"),
        ("aaaa", "ab", "all training images are of one class"),
    ],
)
def test_images_without_another_to_compare_are_refused(
    train: str, val: str, says: str, tmp_path: Path
) -> None:
    data = pack(tmp_path / "set", "classification", train, val)
    with pytest.raises(TesseraError, match=says):
        fit(small("embedding", data), tmp_path / "run")


@pytest.mark.parametrize("kind", ["images", "semantic_segmentation"])
@pytest.mark.parametrize("family", ["autoencoder", "super_resolution"])
@pytest.mark.parametrize("even", [False, True], ids=["noise", "one grey"])
def test_one_image_is_enough_where_only_images_are_read(
    family: str, kind: str, even: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all of its pixels are the same."""
    if even:
        monkeypatch.setitem(
            globals(), "image", lambda number: np.full((SIDE, SIDE, 3), 7, np.uint8)
        )
    content = "" if kind == "images" else "o"
    data = pack(tmp_path / "set", kind, [content], [content])
    fit(small(family, data), tmp_path / "run")
