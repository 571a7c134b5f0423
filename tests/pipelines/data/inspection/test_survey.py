"""Which samples of a data set are read and shown, and which damage is reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from packed_sets import Sample, pack_set, pair
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data import card as cards
from pipelines.data.annotations import Mask, Objects
from pipelines.data.inspection import lists, survey
from pipelines.data.sample_error import SampleError
from pipelines.storage.base import CacheSettings, use_cache
from pipelines.storage.open import open_storage


def image(number: int, width: int = 12, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def labelled(labels: list[int]) -> list[Sample]:
    return [(f"k{number:05d}", image(number), label) for number, label in enumerate(labels)]


def boxed(number: int, labels: list[int]) -> Sample:
    boxes = np.array([[i, 1, i + 2.0, 5] for i in range(len(labels))]).reshape(-1, 4)
    none = np.zeros(len(labels), bool)
    return f"k{number:05d}", image(number), Objects(boxes, np.array(labels, np.int64), none)


@pytest.mark.slow
def test_all_classes_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    """One of 3,000 images is of the rarest class: it is not read, but shown."""
    labels = [0] * 1500 + [1] * 1498 + [2, 3]
    card = pack_set(
        tmp_path, "classification", {"train": labelled(labels)}, "abcd", shard_samples=700
    )
    (train,) = survey.take(tmp_path, card, samples=10).splits
    assert (train.samples, train.read, len(train.sizes)) == (3000, survey.MAX_READ, 1000)
    assert [sample.label for sample in train.shown] == [0, 1, 2, 3, 0, 1, 0, 1, 0, 1]
    (few,) = survey.take(tmp_path, card, samples=2).splits
    assert [sample.label for sample in few.shown] == [0, 3]
    again = survey.take(tmp_path, card, samples=10).splits[0]
    assert [s.key for s in again.shown] == [s.key for s in train.shown]


def test_objects_are_counted_and_images_without_objects_are_shown(tmp_path: Path) -> None:
    given = [boxed(number, [0] * (number % 4)) for number in range(40)] + [boxed(99, [1])]
    card = pack_set(tmp_path, "detection", {"train": given}, ("cell", "rare"))
    (train,) = survey.take(tmp_path, card, samples=3).splits
    assert train.objects == [number % 4 for number in range(40)] + [1]
    assert train.box_sides == pytest.approx([8**0.5] * 61)
    shown = [s.annotation for s in train.shown]
    assert all(isinstance(annotation, Objects) for annotation in shown)
    assert [sorted(set(a.labels.tolist())) for a in shown if isinstance(a, Objects)] == [
        [],
        [0],
        [1],
    ]


def test_every_task_is_surveyed(tmp_path: Path) -> None:
    mask = Mask(np.full((8, 12), 1, np.uint8))
    annotations = {"semantic_segmentation": mask, "images": None, "classification": 1}
    for task, annotation in annotations.items():
        classes = () if task == "images" else ("a", "b")
        given: list[Sample] = [("one", image(0), annotation), ("two", image(1, 5, 7), None)]
        given = given if task == "images" else given[:1]
        card = pack_set(tmp_path / task, task, {"val": given}, classes)
        (val,) = survey.take(tmp_path / task, card, samples=5).splits
        assert val.sizes == ([(8, 12), (7, 5)] if task == "images" else [(8, 12)])
        assert val.shown[0].image.tobytes() == image(0).tobytes()
        result = val.shown[0].annotation
        if isinstance(annotation, Mask):
            assert isinstance(result, Mask)
            np.testing.assert_array_equal(result.pixels, annotation.pixels)
        else:
            assert result is None
            assert val.shown[0].label == (-1 if annotation is None else annotation)


def test_near_duplicates_are_shown_most_similar_first(tmp_path: Path) -> None:
    sides = {"train": labelled([0, 0, 0]), "test": labelled([0, 0])}
    pairs = [
        pair(("train", "k00002"), ("test", "k00001"), 9),
        pair(("train", "k00000"), ("test", "nowhere"), 30),
        pair(("train", "k00001"), ("test", "k00000"), 3),
    ]
    card = pack_set(tmp_path, "classification", sides, "a", pairs=pairs, shard_samples=2)
    result = survey.take(tmp_path, card, samples=1).pairs
    assert [row.distance for row, _, _ in result] == [3, 9, 30]
    keys = [(left and left.key, right and right.key) for _, left, right in result]
    assert keys == [("k00001", "k00000"), ("k00002", "k00001"), ("k00000", None)]


@pytest.mark.parametrize("file", [lists.NEAR_DUPLICATES, lists.REJECTED, lists.COPIES])
@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"key": 3, "reason": "x"}', "[" * 200_000, "\0", '{"left": NaN}']
)
def test_a_damaged_list_is_reported_with_its_line(tmp_path: Path, file: str, line: str) -> None:
    card = pack_set(tmp_path, "classification", {"train": labelled([0])}, "a")
    good = json.dumps(
        {
            **pair(("train", "a"), ("val", "b"), 1),
            "key": "a",
            "reason": "unreadable image",
            "split": "train",
            "images": [],
        }
    )
    (tmp_path / file).write_text(f"{good}\n{line}\n")
    with pytest.raises(TesseraError, match=f"{file}, line 2 can't be read"):
        survey.take(tmp_path, card, samples=1)


@pytest.mark.fault(4)
def test_damage_is_reported(tmp_path: Path) -> None:
    card = pack_set(tmp_path, "classification", {"train": labelled([0] * 9)}, "a", shard_samples=3)
    survey.check(tmp_path, card)
    index = tmp_path / "train/index.npy"
    whole = index.read_bytes()
    index.write_bytes(whole[:-3] + b"xyz")
    with pytest.raises(TesseraError, match="shard 2: checksum differs"):
        survey.check(tmp_path, card)
    index.write_bytes(whole)
    tar = tmp_path / "train/000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-512])
    with pytest.raises(TesseraError, match=r"000001\.tar .* bytes"):
        survey.check(tmp_path, card)
    tar.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    survey.check(tmp_path, card)  # sizes only; but what is shown is checked
    with pytest.raises(TesseraError, match=r"000001\.tar, sample 3: checksum differs"):
        survey.take(tmp_path, card, samples=1)
    tar.unlink()
    with pytest.raises(TesseraError, match=r"000001\.tar .* is missing"):
        survey.check(tmp_path, card)


def test_an_invalid_annotation_is_reported(tmp_path: Path) -> None:
    given = (
        "odd",
        image(0),
        Objects(np.array([[1, 1, 99, 5.0]]), np.array([0]), np.array([False])),
    )
    card = pack_set(tmp_path, "detection", {"train": [given]}, "a")
    with pytest.raises(SampleError, match=r"train, sample odd.* outside"):
        survey.take(tmp_path, card, samples=1)


def test_few_shards_of_a_remote_data_set_are_fetched(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    pairs = [pair(("train", "k00000"), ("train", "k00199"), 1)]
    given = labelled([number // 100 for number in range(200)])
    card = pack_set(folder, "classification", {"train": given}, "ab", shard_samples=5, pairs=pairs)
    storage = open_storage("memory://survey/set")
    for path in sorted(folder.rglob("*.*")):
        storage.write(path.relative_to(folder).as_posix(), path.read_bytes())
    cache = tmp_path / "cache"
    use_cache(CacheSettings(cache))
    try:
        assert cards.read("memory://survey/set") == card
        survey.check("memory://survey/set", card)
        seen = survey.take("memory://survey/set", card, samples=4)
    finally:
        use_cache(None)
    (train,) = seen.splits
    assert train.read == survey.REMOTE_SHARDS * 5
    assert [sample.label for sample in train.shown] == [0, 1, 0, 1]
    assert [images for _, *images in seen.pairs] == [[None, None]]
    shards = {shard.sha256 for shard in card.splits["train"].shards}
    fetched = [path.name for path in cache.rglob("*") if path.name in shards]
    assert len(fetched) == survey.REMOTE_SHARDS
