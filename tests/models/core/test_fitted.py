"""Rules that choose settings for a data set, each with figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from models.core.fitted import DataFacts, Fitted, flip, frame, length, light, square

PHOTOS = DataFacts(
    samples=1142, channels=3, heights=(348, 464), widths=(348, 464), classes=("Kiwi", "Lemon")
)
ICONS = DataFacts(
    samples=50_000, channels=3, heights=(32, 32), widths=(32, 32), classes=("cat", "dog")
)
DIGITS = replace(ICONS, samples=1437, channels=1, classes=tuple("0123456789"))
SETTINGS = {
    "train.batch_size": 128,
    "train.epochs": 10,
    "workers.count": 2,
    "optim.model.kind": "sgd",
    "optim.model.lr": 0.1,
}


def values(fitted: Any) -> dict[str, Any]:
    chosen: list[Fitted] = list(fitted)
    assert all(one.reason for one in chosen)
    return {one.path: one.value for one in chosen}


def test_few_images_get_smaller_batches_more_epochs_and_a_lower_rate() -> None:
    assert values(length(PHOTOS, SETTINGS, (), steps=2000)) == {
        "train.batch_size": 32,  # 36 steps an epoch; 64 would make 18
        "train.epochs": 56,
        "train.patience": 18,
        "optim.model.lr": 0.025,
    }


def test_the_rate_of_adam_follows_the_square_root_of_the_batch() -> None:
    settings = {**SETTINGS, "optim.model.kind": "adamw"}
    assert values(length(PHOTOS, settings, (), steps=2000))["optim.model.lr"] == 0.05


def test_each_part_keeps_the_proportion_of_its_rate() -> None:
    settings = {
        **SETTINGS,
        "optim.critic.kind": "adam",
        "optim.critic.lr": 4e-4,
        "optim.critic.lr_decay": 0.5,
    }
    chosen = values(length(PHOTOS, settings, (), steps=2000))
    assert chosen["optim.critic.lr"] == 2e-4
    assert "optim.critic.lr_decay" not in chosen


def test_many_images_keep_batch_epochs_and_rate() -> None:
    assert values(length(ICONS, SETTINGS, (), steps=2000)) == {
        "train.batch_size": 128,
        "train.epochs": 10,
        "train.patience": 5,
    }


@pytest.mark.parametrize(("samples", "epochs"), [(1, 100), (20, 100), (300, 53)])
def test_the_fewest_images_get_bounded_epochs(samples: int, epochs: int) -> None:
    chosen = values(length(replace(PHOTOS, samples=samples), SETTINGS, (), steps=2000))
    assert chosen["train.batch_size"] == 8
    assert chosen["train.epochs"] == epochs


def test_a_batch_of_the_users_keeps_its_rate() -> None:
    settings = {**SETTINGS, "train.batch_size": 64}
    chosen = values(length(PHOTOS, settings, ("train.batch_size",), steps=2000))
    assert chosen["train.batch_size"] == 64
    assert chosen["train.epochs"] == 112 - 12  # 18 steps an epoch, and at most 100 epochs
    assert "optim.model.lr" not in chosen


def test_epochs_of_the_users_are_all_trained() -> None:
    chosen = values(length(PHOTOS, {**SETTINGS, "train.epochs": 30}, ("train.epochs",), steps=2000))
    assert not {"train.epochs", "train.patience"} & set(chosen)


@pytest.mark.parametrize(("workers", "batch"), [(12, 32), ("2:50", 50), (3000, 128)])
def test_a_batch_has_an_image_for_each_worker(workers: int | str, batch: int) -> None:
    settings = {**SETTINGS, "workers.count": workers}
    assert values(length(PHOTOS, settings, (), steps=2000))["train.batch_size"] == batch


def test_a_batch_below_the_least_is_not_raised() -> None:
    settings = {**SETTINGS, "train.batch_size": 4}
    assert values(length(PHOTOS, settings, (), steps=2000))["train.batch_size"] == 4


@pytest.mark.parametrize(
    ("facts", "side"),
    [
        (PHOTOS, 224),
        (replace(PHOTOS, heights=(90, 150), widths=(100, 4000)), 128),
        (replace(ICONS, heights=(20, 40), widths=(18, 60)), 40),
    ],
)
def test_whole_images_become_squares(facts: DataFacts, side: int) -> None:
    assert values(square(facts, 224)) == {"data.height": side, "data.width": side}


def test_small_images_of_one_size_keep_it() -> None:
    assert values(square(ICONS, 224)) == {}
    assert values(square(replace(ICONS, widths=(48, 48)), 224)) == {}


@pytest.mark.parametrize(
    ("heights", "widths", "expected"),
    [
        ((480, 480), (640, 640), {}),
        ((240, 480), (640, 640), {"data.fit": "pad"}),
        ((2062, 2062), (2149, 2149), {"data.height": 608, "data.width": 640}),
        ((100, 1371), (100, 2048), {"data.height": 416, "data.width": 640, "data.fit": "pad"}),
        ((30, 30), (4000, 4000), {"data.height": 32, "data.width": 640}),
    ],
)
def test_a_frame_keeps_the_shape_of_the_largest_image(
    heights: tuple[int, int], widths: tuple[int, int], expected: dict[str, Any]
) -> None:
    facts = replace(PHOTOS, heights=heights, widths=widths)
    assert values(frame(facts, 640)) == expected


@pytest.mark.parametrize(
    ("classes", "flipped"),
    [
        (("Kiwi", "Lemon"), True),
        ((), True),
        (("copyright", "leftover"), True),
        (("turn_left", "turn_right"), False),
        (("Left hand", "nose"), False),
        (("a", "b"), False),
        (("17", "18"), False),
    ],
)
def test_mirror_images_are_made_unless_the_classes_have_a_side(
    classes: tuple[str, ...], flipped: bool
) -> None:
    assert values(flip(replace(PHOTOS, classes=classes))) == {"augment.flip": flipped}


def test_small_grey_images_and_drawings_stay_as_they_are() -> None:
    assert values(flip(DIGITS)) == {}
    assert values(light(DIGITS, brightness=0.2)) == {}
    assert values(light(ICONS, brightness=0.2)) == {}
    assert values(light(PHOTOS, brightness=0.2)) == {"augment.brightness": 0.2}
