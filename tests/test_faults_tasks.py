"""Every defect of a data set is met with its outcome whatever the task: refused with the sample's key
where it is packed, and where it is read again; refused or allowed where it is of another kind or has
other classes. `test_odd_data.py` has what is odd and legal."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_work
import torch
from click.testing import CliRunner
from packed_sets import pack_set
from PIL import Image

import models
from jobs import train
from models.core.errors import TesseraError
from models.core.family import Task
from pipelines import checkpoints, worker
from pipelines import recipe as recipes
from pipelines.checkpoints import Progress
from pipelines.data import annotations, rle, shards, verifying
from pipelines.data import card as cards
from pipelines.data.annotations import IGNORED, Mask, Objects
from pipelines.data.card import Card, ImageCard
from pipelines.data.loading import EvalLoader, TrainLoader
from pipelines.data.samples import encode_png
from pipelines.data.shards import Packed
from pipelines.ports import World

SIDE = 16
CLASSES = ("ant", "bee", "cat")
KINDS = (
    "classification",
    "detection",
    "instance_segmentation",
    "semantic_segmentation",
    "images",
)
FAMILIES = {
    "classification": "cnn",
    "detection": "yolo",
    "generation": "dcgan",
    "instance_segmentation": "mask_rcnn",
    "reconstruction": "autoencoder",
    "semantic_segmentation": "unet",
    "upscaling": "super_resolution",
    "verification": "embedding",
}
"""One that does each task."""


def test_no_task_is_left_out() -> None:
    assert {models.get(name).task.name for name in models.names()} == FAMILIES.keys()
    assert all(models.get(family).task.name == task for task, family in FAMILIES.items())


# ── a packed set whose checksums are right, and what it says is wrong ─────────────────────────


def pixels(number: int, *, channels: int = 3) -> np.ndarray[Any, Any]:
    shape = (SIDE, SIDE, channels) if channels > 1 else (SIDE, SIDE)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def objects(number: int, *, masks: bool) -> Objects:
    boxes = np.array([[1, 2, 9 + number, 12], [3, 3, 9, 10]], np.float64)
    drawn = np.zeros((2, SIDE, SIDE), np.uint8)
    for mask, (left, top, right, bottom) in zip(drawn, boxes.astype(int).tolist()):
        mask[top:bottom, left:right] = 1
    texts = tuple(rle.write(rle.of_mask(mask)) for mask in drawn) if masks else None
    return Objects(boxes, np.array([number % 3, 2]), np.zeros(2, bool), texts)


def said(kind: str, number: int) -> Any:
    """What is said of an image of that kind: a class, objects, classes of pixels, nothing."""
    if kind == "classification":
        return number % 3
    if kind == "images":
        return None
    if kind == "semantic_segmentation":
        return Mask(pixels(number, channels=1) % 3)
    return objects(number, masks=kind == "instance_segmentation")


def good(kind: str, number: int) -> Packed:
    image = ("png", encode_png(pixels(number)))
    note = said(kind, number)
    if kind == "classification":
        return Packed(f"s{number}", image, ("cls", b"%d" % note), note)
    return Packed(f"s{number}", image, note and annotations.encode(note))


def seal(folder: Path, kind: str, changed: Packed | None = None) -> Card:
    """A data set of four samples, its third as it was changed, with checksums to fit."""
    given = [good(kind, number) for number in range(4)]
    if changed:
        given[2] = changed
    split = shards.write(folder, "train", given, shard_samples=2)
    sides = dict.fromkeys(("min_height", "max_height", "min_width", "max_width"), SIDE)
    image = ImageCard(channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, **sides)
    classes = () if kind == "images" else CLASSES
    card = Card(name="x", task=kind, classes=classes, image=image, splits={"train": split})
    (folder / "card.json").write_text(card.sealed().to_json())
    return card.sealed()


def read(way: str, folder: Path, card: Card, reads: str | None = None) -> list[Any]:
    """The batches of a training or of an evaluation."""
    spec = card.spec(reads=reads)
    if way == "evaluation":
        evaluation = EvalLoader(
            folder, card, spec, batch_size=3, world=World(), split="train", cache="none"
        )
        return [batch for _, batch in evaluation.batches()]
    loader = TrainLoader(folder, card, spec, batch_size=3, seed=0, world=World(), cache="none")
    try:
        return [step.batch for step in loader.epoch(0)]
    finally:
        loader.close()


def told(kind: str, **changes: Any) -> bytes:
    """Objects as JSON, with other fields."""
    fields = json.loads(annotations.encode(said(kind, 2))[1])
    kept = {name: value for name, value in {**fields, **changes}.items() if value is not None}
    return json.dumps(kept).encode()


def box(*sides: Any) -> dict[str, Any]:
    return {"boxes": [[1, 2, 9, 12], list(sides)]}


OBJECTS: dict[str, dict[str, Any] | bytes] = {
    "box NaN": box(1, 2, math.nan, 12),
    "box infinite": box(1, -math.inf, 9, 12),
    "box too large for a float": b'{"boxes":[[1,2,9,1e999]],"crowd":[0],"labels":[0]}',
    "box without area": box(5, 2, 5, 12),
    "box inverted": box(9, 2, 1, 12),
    "box outside": box(20, 20, 25, 25),
    "box half outside": box(1, 2, 17, 12),
    "box negative": box(-1, 2, 9, 12),
    "boxes normalised": {"boxes": [[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]]},
    "box of three": box(1, 2, 9),
    "label -1": {"labels": [0, -1]},
    "label -100": {"labels": [0, -100]},
    "label of no class": {"labels": [0, 3]},
    "label of 30 digits": {"labels": [0, 10**30]},
    "label of letters": {"labels": [0, "cat"]},
    "label too few": {"labels": [0]},
    "label too many": {"labels": [0, 1, 2]},
    "crowd too few": {"crowd": [0]},
    "a key twice": b'{"boxes":[],"crowd":[],"labels":[],"labels":[]}',
    "200,000 levels": b"[" * 200_000,
    "nothing": b"",
    "no JSON": b"\x89PNG\r\n\x1a\n",
}
EMPTY = rle.write(rle.of_mask(np.zeros((SIDE, SIDE), np.uint8))).decode()
LARGER = rle.write(rle.of_mask(np.ones((SIDE + 1, SIDE), np.uint8))).decode()
INSTANCES = {
    "masks too few": {"masks": [json.loads(told("instance_segmentation"))["masks"][0]]},
    "masks missing": {"masks": None},
    "mask without pixels": {"masks": [EMPTY, EMPTY]},
    "mask of another size": {"masks": [LARGER, LARGER]},
    "mask of no run lengths": {"masks": ["\x00", "~"]},
}


def picture(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def areas(value: int, height: int = SIDE) -> np.ndarray[Any, Any]:
    found = np.zeros((height, SIDE), np.uint8)
    found[3:6, 2:5] = value
    return found


def damage(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


MASKS: dict[str, bytes] = {
    "of another size": encode_png(areas(1, SIDE + 1)),
    "turned": encode_png(areas(1, 2 * SIDE).T.copy()),
    "damaged": damage(encode_png(areas(1))),
    "cut": encode_png(areas(1))[:-15],
    "of no class": encode_png(areas(3)),
    "of no class, beside what is ignored": encode_png(areas(254)),
    "without a class": encode_png(np.full((SIDE, SIDE), IGNORED, np.uint8)),
    "of 16 bits": picture(Image.fromarray(areas(1).astype(np.uint16))),
    "of 1 bit": picture(Image.fromarray(areas(1) > 0)),
    "of a palette": picture(Image.fromarray(areas(1)).convert("P")),
    "of colours": encode_png(areas(1)[..., None].repeat(3, 2)),
    "transparent": picture(Image.fromarray(areas(1)), transparency=0),
    "a JPEG": picture(Image.fromarray(areas(1)), "JPEG"),
    "nothing": b"",
}
LABELS = {f"label {label}": label for label in (-1, -100, 3, 2**31 - 1)}


def forged(kind: str, name: str) -> Packed:
    sound = good(kind, 2)
    if kind == "classification":
        label = LABELS[name]
        return sound._replace(note=("cls", b"%d" % label), label=label)
    if kind == "semantic_segmentation":
        return sound._replace(note=("mask.png", MASKS[name]))
    given = {**OBJECTS, **INSTANCES}[name]
    return sound._replace(note=("json", given if isinstance(given, bytes) else told(kind, **given)))


DEFECTS = [
    *(("classification", name) for name in LABELS),
    *(("detection", name) for name in OBJECTS),
    *(("instance_segmentation", name) for name in (*OBJECTS, *INSTANCES)),
    *(("semantic_segmentation", name) for name in MASKS),
]


@pytest.mark.fault(20, 24, 26, 27, 28)
@pytest.mark.parametrize(("kind", "name"), DEFECTS, ids=[f"{k}, {n}" for k, n in DEFECTS])
def test_what_is_said_wrongly_reaches_no_network(kind: str, name: str, tmp_path: Path) -> None:
    card = seal(tmp_path, kind, forged(kind, name))
    assert not verifying.verify(tmp_path, workers=1).differences, "no checksum tells"
    for way in ("training", "evaluation"):
        with pytest.raises(TesseraError, match=r"sample s2\b"):
            read(way, tmp_path, card)
        assert len(read(way, tmp_path, card, "images")) == 2, "of the images nothing is said"


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_sets_are_read(kind: str, tmp_path: Path) -> None:
    """The control of the test above."""
    card = seal(tmp_path, kind)
    for way in ("training", "evaluation"):
        assert sum(len(batch["key"]) for batch in read(way, tmp_path, card)) == 4


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize("name", ["box outside", "label -1", "mask of another size"])
def test_instances_are_checked_where_boxes_alone_are_read(name: str, tmp_path: Path) -> None:
    card = seal(tmp_path, "instance_segmentation", forged("instance_segmentation", name))
    for way in ("training", "evaluation"):
        with pytest.raises(TesseraError, match=r"sample s2\b"):
            read(way, tmp_path, card, "detection")


@pytest.mark.fault(20, 21, 25)
@pytest.mark.parametrize("change", [damage, lambda data: data[:60], lambda data: b"<html>"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_image_reaches_no_network(
    kind: str, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    sound = good(kind, 2)
    card = seal(tmp_path, kind, sound._replace(image=("png", change(sound.image[1]))))
    for way in ("training", "evaluation"):
        with pytest.raises(TesseraError, match=r"the image of sample s2\b"):
            read(way, tmp_path, card)


# ── data of another kind, and of other classes ────────────────────────────────────────────────


def packed(folder: Path, kind: str, classes: tuple[str, ...] = CLASSES) -> Card:
    """A data set of that kind with a few images in each split."""
    splits = {
        split: [
            (f"{split}{number}", Image.fromarray(pixels(9 * at + number)), said(kind, number))
            for number in range(6)
        ]
        for at, split in enumerate(("train", "val", "test"))
    }
    return pack_set(folder, kind, splits, () if kind == "images" else classes)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of each kind, in the folder of its name."""
    root = tmp_path_factory.mktemp("sets")
    for kind in KINDS:
        packed(root / kind, kind)
    return root


def untrained(family: str, data: Path, folder: Path, **changes: Any) -> str:
    """A model's files, of a network that learned nothing; gives their digest."""
    given = {"data.path": str(data), **changes}
    recipe = recipes.start(family, "tiny").with_overrides(given)
    card = cards.read(data)
    torch.manual_seed(5)
    module = models.get(family).build(recipe.config(), worker.seen_of(recipe, card))
    path = checkpoints.save(
        folder.parent / f"{folder.name}-checkpoint",
        weights=module.state_dict(),
        training=None,
        optimizers={},
        recipe=recipe,
        card=card,
        progress=Progress(),
    )
    return checkpoints.write_model(path, folder)


@pytest.fixture(scope="module")
def judge(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("judge") / "model"
    return folder, untrained("cnn", sets / "classification", folder)


def evaluate(model: Path, digest: str, data: Path, judge: Path) -> dict[str, Any]:
    payload = {"model": str(model), "digest": digest, "data": str(data), "split": "test"}
    return worker.evaluate({**payload, "judge": str(judge)}, World(), rank_work.Nothing())


@pytest.fixture(params=sorted(FAMILIES))
def model(
    request: pytest.FixtureRequest, sets: Path, judge: tuple[Path, str], tmp_path: Path
) -> tuple[Task, Path, str]:
    """One of each task, as if it was trained on the set that its data are of."""
    task: Task = models.get(FAMILIES[request.param]).task
    judged = {"judge": "models:/x/1", "judge_digest": judge[1]} if task.judged else {}
    folder = tmp_path / "model"
    return task, folder, untrained(FAMILIES[task.name], sets / task.reads, folder, **judged)


@pytest.mark.fault(30)
def test_other_classes_are_refused_where_answers_are_classes(
    model: tuple[Task, Path, str], judge: tuple[Path, str], tmp_path: Path
) -> None:
    """In another order, under another name, one more. Where two images are compared, and where only
    images are read, they are no matter."""
    task, folder, digest = model
    kind = "classification" if task.reads == "images" else task.reads
    for number, classes in enumerate([CLASSES[::-1], ("ant", "bee", "dog"), (*CLASSES, "dog")]):
        packed(tmp_path / str(number), kind, classes)
        if not task.knows_classes:
            found = evaluate(folder, digest, tmp_path / str(number), judge[0])
            assert all(map(math.isfinite, found["figures"].values()))
            continue
        with pytest.raises(TesseraError, match=f"the data set has {', '.join(classes)}") as caught:
            evaluate(folder, digest, tmp_path / str(number), judge[0])
        assert "knows the classes ant, bee, cat" in caught.value.message


@pytest.mark.fault(30)
def test_a_model_is_evaluated_on_every_kind_that_it_can_read(
    model: tuple[Task, Path, str], judge: tuple[Path, str], sets: Path
) -> None:
    task, folder, digest = model
    for kind in KINDS:
        if not cards.read(sets / kind).can_be_read_as(task.reads):
            with pytest.raises(TesseraError, match="but the data set is one of"):
                evaluate(folder, digest, sets / kind, judge[0])
            continue
        found = evaluate(folder, digest, sets / kind, judge[0])
        assert found["samples"] == 6
        assert task.primary.name in found["figures"]


READABLE = {
    "classification": {"classification", "images"},
    "detection": {"detection", "images"},
    "instance_segmentation": {"instance_segmentation", "detection", "images"},
    "semantic_segmentation": {"semantic_segmentation", "images"},
    "images": {"images"},
}
"""As what the data of each kind can be read."""


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_another_kind_are_refused_with_who_can_train_on_them(kind: str, sets: Path) -> None:
    card = cards.read(sets / kind)
    fitting = [n for n in models.names() if models.get(n).task.reads in READABLE[kind]]
    for name in models.names():
        if name in fitting:
            worker.check_readable(models.get(name), card)
            continue
        with pytest.raises(
            TesseraError, match=f"^{name} does .* one of {kind.replace('_', ' ')}"
        ) as caught:
            worker.check_readable(models.get(name), card)
        assert caught.value.mend == f"these train on it: {', '.join(fitting)}"


UNFIT = [
    (family, kind)
    for task, family in FAMILIES.items()
    for kind in KINDS
    if models.get(family).task.reads not in READABLE[kind]
]


@pytest.mark.parametrize(("family", "kind"), UNFIT, ids=[f"{f}, {k}" for f, k in UNFIT])
def test_nothing_is_written_for_data_of_another_kind(
    family: str, kind: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a training, nor before one is submitted, nor by a dry run."""
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "home"))
    command = [family, "--variant", "tiny", "--workers", "0", "--data", str(sets / kind)]
    for more in ([], ["--dry-run"]):
        ran = CliRunner().invoke(train.command, [*command, *more])
        assert isinstance(ran.exception, TesseraError)
        assert "but the data set is one of" in ran.exception.message
    given = train.command.make_context("train", command).params
    with pytest.raises(TesseraError, match="but the data set is one of"):
        train.check(given)
    assert not list(tmp_path.iterdir())
