"""The assignment of samples to shards: a function of the source, identified by a digest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from models.core.errors import TesseraError
from pipelines.data.annotations import Annotation, Objects
from pipelines.data.images import encode_png
from pipelines.data.packing.pack import pack
from pipelines.data.packing.plan import PackPlan, digest, make_plan, split_items
from pipelines.data.packing.shard import PackSpec
from pipelines.data.sample_error import SampleError
from pipelines.data.shards import SHARD_BYTES, SHARD_SAMPLES
from pipelines.data.sources import Item, Source


def encode(size: int, item: Item) -> bytes:
    """Noise, which PNG can't compress."""
    pixels = np.random.default_rng(item.row).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return encode_png(pixels)


def refuse(item: Item) -> bytes:
    raise SampleError("unreadable image", item.key)


def source(count: int, size: int = 4, splits: Sequence[str | None] = (None,)) -> Source:
    items = [
        Item(f"{n:05d}", f"{n}.png", n % 2, splits[n % len(splits)], n)  # type: ignore[arg-type]
        for n in range(count)
    ]
    return Source("set", "classification", ("a", "b"), items, partial(encode, size))


def plan_of(
    source: Source,
    shard_samples: int | None = None,
    seed: int = 0,
    unseen: frozenset[int] = frozenset(),
) -> PackPlan:
    spec = PackSpec(replace(source, items=()), "", None, "")
    return make_plan(source, spec, seed=seed, shard_samples=shard_samples, unseen=unseen)


def sizes(plan: PackPlan, split: str) -> list[int]:
    return [len(shard_plan.items) for shard_plan in plan.shards if shard_plan.split == split]


def test_shards_of_a_split_are_as_even_as_possible() -> None:
    plan = plan_of(source(100, splits=("train", "train", "val", "test")), shard_samples=20)
    assert sizes(plan, "train") == [16, 17, 17]
    assert sizes(plan, "val") == [12, 13]
    assert [shard_plan.path for shard_plan in plan.shards[:2]] == [
        "train/000000.tar",
        "train/000001.tar",
    ]
    assert plan.samples == plan.total == 100


def test_shards_of_large_images_have_few_samples() -> None:
    small, large = source(6000, 2), source(6000, 300)
    assert len(sizes(plan_of(small), "train")) == -(-4800 // SHARD_SAMPLES)
    shard = max(sizes(plan_of(large), "train"))
    assert 0.9 * SHARD_BYTES < shard * (300 * 300 * 3) < SHARD_BYTES


def test_the_shard_size_is_estimated_although_the_first_images_are_unreadable() -> None:
    bad = replace(source(200), load=refuse)
    assert sizes(plan_of(bad), "train") == [160]


def test_a_plan_does_not_depend_on_the_order_of_the_items() -> None:
    original = source(60)
    turned = replace(original, items=original.items[::-1])
    assert plan_of(original) == plan_of(turned)
    assert digest(plan_of(original), original, {}) == digest(plan_of(turned), turned, {})


def test_the_digest_covers_the_items_and_the_settings() -> None:
    original = source(60)
    first = digest(plan_of(original, 20), original, {"seed": 0})
    for field, value in (("key", "new"), ("origin", "x"), ("label", 0), ("row", 99)):
        items = [replace(original.items[1], **{field: value}), *original.items]  # type: ignore[arg-type]
        other = replace(original, items=items[:1] + items[1:2] + items[3:])
        assert digest(plan_of(other, 20), other, {"seed": 0}) != first, field
    assert digest(plan_of(original, 20), original, {"seed": 1}) != first
    assert digest(plan_of(original, 20, seed=1), original, {"seed": 0}) != first
    assert digest(plan_of(original, 21), original, {"seed": 0}) == first, "it makes the same shards"
    assert digest(plan_of(original, 10), original, {"seed": 0}) != first
    named = replace(original, classes=("b", "a"))
    assert digest(plan_of(named, 20), named, {"seed": 0}) != first


def test_items_without_labels_are_one_stratum() -> None:
    original = source(50)
    items = [replace(item, label=None) for item in original.items]
    plan = plan_of(replace(original, task="images", classes=(), items=items))
    assert (sum(sizes(plan, "train")), sum(sizes(plan, "val"))) == (40, 5)


def test_an_image_class_missing_in_train_is_refused() -> None:
    original = source(40, splits=("train", "test"))  # odd ones are of class b, and of test
    with pytest.raises(TesseraError, match="test has the class 'b', train doesn't"):
        plan_of(original)


def annotate(classes: int, item: Item) -> Annotation:
    label = 1 if item.split == "test" else 0
    return Objects(np.array([[0.0, 0.0, 2.0, 2.0]]), np.array([label]), np.array([False]))


def test_an_object_class_missing_in_train_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    from pipelines.data.importers import digits

    original = source(40, splits=("train", "test"))
    result = replace(
        original, task="detection", classes=("a", "b", "c"), annotate=partial(annotate, 3)
    )
    monkeypatch.setattr(digits, "read", lambda *_: result)
    messages: list[str] = []
    card = pack("digits", f"{tmp_path}/out", notify=messages.append)
    assert "no train image has the class 'b'; only test images do" in messages
    assert "no train image has the class 'c'" in messages
    assert card.splits["test"].class_counts == {"a": 0, "b": 20, "c": 0}


def test_many_classes_missing_in_train_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    from pipelines.data.importers import digits

    classes = tuple(f"class {number}" for number in range(34))
    original = source(40, splits=("train", "test"))
    result = replace(
        original, task="detection", classes=classes, annotate=partial(annotate, len(classes))
    )
    monkeypatch.setattr(digits, "read", lambda *_: result)
    messages: list[str] = []
    pack("digits", f"{tmp_path}/out", notify=messages.append)
    missing = [line for line in messages if "no train image has" in line]
    assert missing[0] == "no train image has the class 'class 1'; only test images do"
    assert missing[1].startswith("no train image has any of 32 classes (class 2, class 3, ")
    assert missing[1].endswith(", …)")
    assert len(missing) == 2


def labels_of(plan: PackPlan, split: str) -> set[int | None]:
    return {
        item.label
        for shard_plan in plan.shards
        if shard_plan.split == split
        for item in shard_plan.items
    }


@pytest.mark.parametrize("splits", [(None,), ("train", "train", "train", "val", "val", "test")])
def test_unseen_classes_are_only_in_test(splits: Sequence[str | None]) -> None:
    original = source(600, splits=splits)
    items = [replace(item, label=item.row * 7 % 5) for item in original.items]
    original = replace(original, classes=tuple("abcde"), items=items)
    plan = plan_of(original, unseen=frozenset({1, 4}))
    assert labels_of(plan, "train") == labels_of(plan, "val") == {0, 2, 3}
    assert labels_of(plan, "test") == {1, 4}
    assert plan.left_out == 600 - plan.total > 0
    whole = plan_of(original)
    assert whole.left_out == 0
    for split in ("train", "val", "test"):
        both = [
            {i.key for p in made.shards if p.split == split for i in p.items}
            for made in (plan, whole)
        ]
        assert both[0] < both[1], "an image stays in its split"
    assert digest(plan, original, {}) != digest(whole, original, {})
    assert plan == plan_of(replace(original, items=items[::-1]), unseen=frozenset({1, 4}))


def test_an_unseen_class_needs_test_images_and_the_others_train_images() -> None:
    original = source(40, splits=("train", "test"))  # odd ones are of class b, and of test
    assert labels_of(plan_of(original, unseen=frozenset({1})), "test") == {1}
    with pytest.raises(TesseraError, match="test has no image of the unseen class 'a'"):
        plan_of(source(40, splits=("train", "train", "train", "test")), unseen=frozenset({0}))
    with pytest.raises(TesseraError, match="no train image is left: all classes are unseen"):
        plan_of(source(40), unseen=frozenset({0, 1}))


def test_the_split_is_stratified_and_stable_when_images_are_added() -> None:
    items = [
        Item(f"{label}/{n}", "", label)
        for label, size in enumerate((100, 30, 3, 2))
        for n in range(size)
    ]
    parts = split_items(items, 0)
    by_class = {split: Counter(i.label for i in chosen) for split, chosen in parts.items()}
    assert by_class == {
        "train": {0: 80, 1: 24, 2: 1, 3: 2},
        "val": {0: 10, 1: 3, 2: 1},
        "test": {0: 10, 1: 3, 2: 1},
    }
    assert split_items(items[::-1], 0) == parts
    assert split_items(items, 1) != parts
    more = [*items, *(Item(f"4/{n}", "", 4) for n in range(50))]
    assert {i.key for i in parts["val"]} <= {i.key for i in split_items(more, 0)["val"]}


def test_groups_are_not_cut_apart_and_splits_keep_their_size() -> None:
    items = [Item(f"{number:04d}", f"{number}.jpg", number % 2) for number in range(400)]
    groups = {f"{number:04d}": f"{number // 10 * 10:04d}" for number in range(200)}
    parts = split_items(items, 0, groups)
    split_of = {item.key: split for split, found in parts.items() for item in found}
    assert all(split_of[key] == split_of[name] for key, name in groups.items())
    first = {item.key: split for split, found in split_items(items, 0).items() for item in found}
    assert any(first[key] != first[name] for key, name in groups.items()), "the control"
    assert {split: len(found) for split, found in parts.items()} == {
        "train": 320,
        "val": 40,
        "test": 40,
    }
    assert split_items(items[::-1], 0, groups) == parts
    assert split_items(items, 0, {}) == split_items(items, 0)


def test_a_class_of_large_groups_has_one_in_each_split() -> None:
    """Four groups of 10 images of each class: a tenth of a class is less than a group."""
    items = [Item(f"{number:04d}", f"{number}.jpg", number // 40) for number in range(80)]
    groups = {f"{number:04d}": f"{number // 10 * 10:04d}" for number in range(80)}
    parts = split_items(items, 0, groups)
    assert {split: len(found) for split, found in parts.items()} == {
        "train": 40,
        "val": 20,
        "test": 20,
    }
    assert {item.label for item in parts["val"]} == {0, 1}
    # Of two groups, train and val get one each; a single one stays in train.
    for size, expected in ((20, {"train": 40, "val": 40}), (40, {"train": 80})):
        few = {f"{number:04d}": f"{number // size * size:04d}" for number in range(80)}
        parts = split_items(items, 0, few)
        assert {split: len(found) for split, found in parts.items()} == expected
