"""Data of a kind that a task can't read, or with other classes than the model's.

They are refused before anything is written. The message lists the families that can train on them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from click.testing import CliRunner
from noise_sets import CLASSES, KINDS, annotation, pixels
from packed_sets import pack_set
from PIL import Image

import models
from jobs import train
from models.core.errors import TesseraError
from models.core.family import Task
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.interfaces import World
from pipelines.training import checkpoints
from pipelines.training.checkpoints import Progress
from pipelines.training.setup import check_readable, data_spec

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
"""A family for each task."""


def test_every_task_has_a_family_here() -> None:
    assert {models.get(name).task.name for name in models.names()} == FAMILIES.keys()
    assert all(models.get(family).task.name == task for task, family in FAMILIES.items())


def packed(folder: Path, kind: str, classes: tuple[str, ...] = CLASSES) -> Card:
    """A data set of that kind with six images in each split."""
    splits = {
        split: [
            (
                f"{split}{number}",
                Image.fromarray(pixels(9 * offset + number)),
                annotation(kind, number),
            )
            for number in range(6)
        ]
        for offset, split in enumerate(("train", "val", "test"))
    }
    return pack_set(folder, kind, splits, () if kind == "images" else classes)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set of each kind, by name."""
    root = tmp_path_factory.mktemp("sets")
    for kind in KINDS:
        packed(root / kind, kind)
    return root


def untrained(family: str, data: Path, folder: Path, **changes: Any) -> str:
    """Writes the model files of an untrained network; returns their digest."""
    settings = {"data.path": str(data), **changes}
    recipe = recipes.start(family, "tiny").with_overrides(settings)
    card = cards.read(data)
    torch.manual_seed(5)
    module = models.get(family).build(recipe.config(), data_spec(recipe, card))
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
    return rank_work.evaluate(World(), {**payload, "judge": str(judge)})


@pytest.fixture(params=sorted(FAMILIES))
def model(
    request: pytest.FixtureRequest, sets: Path, judge: tuple[Path, str], tmp_path: Path
) -> tuple[Task, Path, str]:
    """A model of each task, as if trained on the data set of the kind that the task reads."""
    task: Task = models.get(FAMILIES[request.param]).task
    needs_judge = {"judge": "models:/x/1", "judge_digest": judge[1]} if task.needs_judge else {}
    folder = tmp_path / "model"
    return task, folder, untrained(FAMILIES[task.name], sets / task.reads, folder, **needs_judge)


@pytest.mark.fault(30)
def test_other_classes_are_refused_by_tasks_that_predict_classes(
    model: tuple[Task, Path, str], judge: tuple[Path, str], tmp_path: Path
) -> None:
    """In another order, with another name, or one more. Other tasks accept them."""
    task, folder, digest = model
    kind = "classification" if task.reads == "images" else task.reads
    for number, classes in enumerate([CLASSES[::-1], ("ant", "bee", "dog"), (*CLASSES, "dog")]):
        packed(tmp_path / str(number), kind, classes)
        if not task.knows_classes:
            result = evaluate(folder, digest, tmp_path / str(number), judge[0])
            assert all(map(math.isfinite, result["metrics"].values()))
            continue
        with pytest.raises(TesseraError, match=f"the data set has {', '.join(classes)}") as caught:
            evaluate(folder, digest, tmp_path / str(number), judge[0])
        assert "knows the classes ant, bee, cat" in caught.value.message


@pytest.mark.fault(30)
def test_a_model_is_evaluated_on_every_kind_of_data_that_it_can_read(
    model: tuple[Task, Path, str], judge: tuple[Path, str], sets: Path
) -> None:
    task, folder, digest = model
    for kind in KINDS:
        if not cards.read(sets / kind).can_be_read_as(task.reads):
            with pytest.raises(TesseraError, match="but the data set is one of"):
                evaluate(folder, digest, sets / kind, judge[0])
            continue
        result = evaluate(folder, digest, sets / kind, judge[0])
        assert result["samples"] == 6
        assert task.primary.name in result["metrics"]


READABLE = {
    "classification": {"classification", "images"},
    "detection": {"detection", "images"},
    "instance_segmentation": {"instance_segmentation", "detection", "images"},
    "semantic_segmentation": {"semantic_segmentation", "images"},
    "images": {"images"},
}
"""The kinds that the data of each kind can be read as."""


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_another_kind_are_refused_with_the_families_that_fit(kind: str, sets: Path) -> None:
    card = cards.read(sets / kind)
    fitting = [n for n in models.names() if models.get(n).task.reads in READABLE[kind]]
    for name in models.names():
        if name in fitting:
            check_readable(models.get(name), card)
            continue
        with pytest.raises(
            TesseraError, match=f"^{name} does .* one of {kind.replace('_', ' ')}"
        ) as caught:
            check_readable(models.get(name), card)
        assert caught.value.hint == f"these train on it: {', '.join(fitting)}"


UNFIT = [
    (family, kind)
    for task, family in FAMILIES.items()
    for kind in KINDS
    if models.get(family).task.reads not in READABLE[kind]
]


@pytest.mark.parametrize(("family", "kind"), UNFIT, ids=[f"{f}, {k}" for f, k in UNFIT])
def test_data_of_another_kind_are_refused_before_anything_is_written(
    family: str, kind: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a training, a dry run, and the check before a job is submitted."""
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "home"))
    command = [family, "--variant", "tiny", "--workers", "0", "--data", str(sets / kind)]
    for more in ([], ["--dry-run"]):
        ran = CliRunner().invoke(train.command, [*command, *more])
        assert isinstance(ran.exception, TesseraError)
        assert "but the data set is one of" in ran.exception.message
    options = train.command.make_context("train", command).params
    with pytest.raises(TesseraError, match="but the data set is one of"):
        train.check(options)
    assert not list(tmp_path.iterdir())
