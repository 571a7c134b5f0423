"""A corrected data set has the corrections, and nothing else differs."""

from __future__ import annotations

import csv
import json
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import foreign_shards
import numpy as np
import pytest
from packed_sets import Sample, pack_set, pair
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data import card as cards
from pipelines.data.annotations import Mask, Objects
from pipelines.data.card import Card
from pipelines.data.inspection.verify import verify
from pipelines.data.packing import in_place
from pipelines.data.packing.fix import fix
from pipelines.data.packing.pack import pack
from pipelines.data.shards import ShardReader

CLASSES = ("cat", "dog", "emu")


def image(number: int, size: int = 8) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def samples(split: str, count: int) -> list[Sample]:
    """`count` of each class; sample N has the class N % 3."""
    shift = 100 * len(split)
    return [(f"{split}/{n}", image(shift + n), n % 3) for n in range(3 * count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    splits = {"train": samples("train", 4), "val": samples("val", 1), "test": samples("test", 2)}
    pack_set(tmp_path / "set", "classification", splits, CLASSES, shard_samples=5)
    return tmp_path / "set"


def write(folder: Path, *rows: str) -> Path:
    file = folder / "corrections.csv"
    file.write_text("\n".join(["sample,action", *rows]) + "\n")
    return file


def content(where: Path | str, split: str) -> dict[str, tuple[bytes, bytes, int]]:
    reader = ShardReader(where, cards.read(where), split)
    found = [reader.read(number) for number in range(len(reader))]
    return {one.key: (one.image, one.note, one.label) for one in found}


def test_only_the_corrected_samples_differ(data: Path, tmp_path: Path) -> None:
    old = cards.read(data)
    steps: list[tuple[int, int]] = []
    file = write(tmp_path, "train/0,dog", "train/7,drop", "test/2.png,cat")
    card = fix(str(data), file, tmp_path / "new", progress=lambda *step: steps.append(step))
    assert not verify(tmp_path / "new").differences
    expected = {split: content(data, split) for split in old.splits}
    expected["train"]["train/0"] = (expected["train"]["train/0"][0], b"1", 1)
    expected["test"]["test/2"] = (expected["test"]["test/2"][0], b"0", 0)
    del expected["train"]["train/7"]
    for split, wanted in expected.items():
        found = content(tmp_path / "new", split)
        assert found == wanted
        assert list(found) == list(wanted)  # and the order
    assert card.splits["train"].class_counts == {"cat": 3, "dog": 4, "emu": 4}
    assert card.splits["test"].class_counts == {"cat": 3, "dog": 2, "emu": 1}
    assert (card.name, card.classes, card.source) == (old.name, old.classes, old.source)
    (made,) = card.corrections
    assert (made.data_digest, made.relabelled, made.dropped) == (old.digest, 2, 1)
    assert card.digest != old.digest
    assert steps[-1][0] == steps[-1][1] == 21
    # A shard without corrections is the same file: its path, its bytes, its checksums.
    assert card.splits["train"].shards[2] == old.splits["train"].shards[2]
    assert card.splits["val"].shards == old.splits["val"].shards


def test_the_same_corrections_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    file = write(tmp_path, "train/0,dog", "val/2,drop")
    fix(str(data), file, tmp_path / "one", allow_empty=True)
    fix(str(data), file, tmp_path / "two", allow_empty=True)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) > 5
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    other = write(tmp_path, "train/0,dog")
    assert fix(str(data), other, tmp_path / "three").digest != cards.read(tmp_path / "one").digest


def test_an_object_store_gets_the_same_data_set(data: Path, tmp_path: Path) -> None:
    file = write(tmp_path, "train/0,dog", "train/7,drop")
    here = fix(str(data), file, tmp_path / "new")
    there = f"memory://{tmp_path.name}/fixed"
    assert fix(str(data), file, there) == here
    assert content(there, "train") == content(tmp_path / "new", "train")
    again = write(tmp_path, "train/1,cat")
    fixed = fix(there, again, f"memory://{tmp_path.name}/again")
    assert [made.data_digest for made in fixed.corrections] == [
        cards.read(data).digest,
        here.digest,
    ]


@pytest.mark.parametrize("resize", [None, 7])
def test_dropping_gives_the_card_of_a_pack_without_the_image(
    resize: int | None, make_folder: Callable[..., Path], make_image: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Sizes, mean and std included. The dropped image is the largest."""
    source = make_folder(tmp_path / "photos", ["cat", "dog"], count=6)
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (source / split / name).mkdir(parents=True)
    for number in range(6):
        for name in ("cat", "dog"):
            split = ("train", "train", "train", "train", "val", "test")[number]
            (source / name / f"{number:03d}.jpg").rename(
                source / split / name / f"{number:03d}.jpg"
            )
    for name in ("cat", "dog"):
        (source / name).rmdir()
    large = make_image(source / "train" / "cat" / "large.png", 99, (30, 20))
    pack(str(source), tmp_path / "all", resize=resize)
    large.unlink()
    expected = pack(str(source), tmp_path / "without", resize=resize)
    fixed = fix(
        str(tmp_path / "all"), write(tmp_path, "train/cat/large.png,drop"), tmp_path / "new"
    )
    assert fixed.splits["train"].class_counts == expected.splits["train"].class_counts
    sizes = ("channels", "min_height", "max_height", "min_width", "max_width")
    for name in sizes:
        assert getattr(fixed.image, name) == getattr(expected.image, name)
    assert fixed.image.mean == expected.image.mean
    assert fixed.image.std == expected.image.std
    assert cards.read(tmp_path / "all").image != expected.image  # so there was something to do


def test_the_lists_lose_what_is_dropped(tmp_path: Path) -> None:
    splits = {"train": samples("train", 2), "test": samples("test", 2)}
    pairs = [
        pair(("train", "train/0"), ("test", "test/0"), 3),
        pair(("train", "train/1"), ("test", "test/1"), 4),
    ]
    rejected = [{"key": "x", "origin": "x.jpg", "reason": "unreadable image", "detail": "cut"}]
    folder = tmp_path / "set"
    pack_set(folder, "classification", splits, CLASSES, pairs=pairs, rejected=rejected)
    group = [("train/1", "dog"), ("train/4", "dog"), ("train/2", "emu")]
    copies = [
        {
            "split": "train",
            "images": [{"key": key, "origin": f"{key}.png", "class": name} for key, name in group],
        }
    ]
    (folder / "copies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in copies))
    (folder / "account.json").write_text("{}\n")
    new = tmp_path / "new"
    card = fix(str(folder), write(tmp_path, "train/0,drop", "train/4,drop", "train/2,dog"), new)
    assert (card.leakage.near, card.leakage.images) == (1, 2)
    assert [json.loads(x) for x in (new / "near_duplicates.jsonl").open()] == [pairs[1]]
    (group_left,) = [json.loads(line) for line in (new / "copies.jsonl").open()]
    assert [(i["key"], i["class"]) for i in group_left["images"]] == [
        ("train/1", "dog"),
        ("train/2", "dog"),
    ]
    assert (new / "account.json").read_text() == "{}\n"
    assert (new / "rejected.jsonl").read_text() == (folder / "rejected.jsonl").read_text()
    everything = write(tmp_path, "train/0,drop", "train/1,drop", "train/2,dog")
    last = fix(str(folder), everything, tmp_path / "last")
    assert (last.leakage.near, last.leakage.images) == (0, 0)
    assert not (tmp_path / "last" / "near_duplicates.jsonl").exists()


def test_a_class_that_loses_all_images_is_refused_or_removed(data: Path, tmp_path: Path) -> None:
    file = write(tmp_path, "val/1,emu")
    with pytest.raises(TesseraError, match="no val image of the class 'dog' is left") as error:
        fix(str(data), file, tmp_path / "new")
    assert "--allow-empty-class" in error.value.hint
    assert not list(tmp_path.glob("*new*"))
    card = fix(str(data), file, tmp_path / "new", allow_empty=True)
    assert card.classes == CLASSES  # the other splits have it
    train = [f"train/{n},emu" for n in range(1, 12, 3)]
    with pytest.raises(TesseraError, match="no train image of the class 'dog' is left, val and te"):
        fix(str(data), write(tmp_path, *train), tmp_path / "less", allow_empty=True)
    every = [*train, "val/1,emu", "test/1,emu", "test/4,drop"]
    card = fix(str(data), write(tmp_path, *every), tmp_path / "less", allow_empty=True)
    assert card.classes == ("cat", "emu")
    assert not verify(tmp_path / "less").differences
    assert card.splits["train"].class_counts == {"cat": 4, "emu": 8}
    labels = {key: label for key, (_, _, label) in content(tmp_path / "less", "train").items()}
    assert labels == {f"train/{n}": int(n % 3 > 0) for n in range(12)}


def test_a_split_is_not_emptied(data: Path, tmp_path: Path) -> None:
    rows = [f"val/{n},drop" for n in range(3)]
    with pytest.raises(TesseraError, match="no val image is left: all 3 are dropped"):
        fix(str(data), write(tmp_path, *rows), tmp_path / "new", allow_empty=True)


def test_a_shard_that_loses_all_samples_is_left_out(data: Path, tmp_path: Path) -> None:
    keys = list(content(data, "train"))[:5]
    card = fix(str(data), write(tmp_path, *(f"{key},drop" for key in keys)), tmp_path / "new")
    assert [shard.samples for shard in card.splits["train"].shards] == [5, 2]
    assert not verify(tmp_path / "new").differences
    assert list(content(tmp_path / "new", "train")) == list(content(data, "train"))[5:]


@pytest.mark.parametrize("task", ["detection", "semantic_segmentation", "images"])
def test_other_tasks_drop_samples(task: str, tmp_path: Path) -> None:
    boxes = np.array([[1, 1, 5, 5.0], [2, 2, 6, 6], [0, 0, 3, 3]])
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:2] = 1
    annotation: Objects | Mask | None = {
        "detection": Objects(boxes, np.array([0, 1, 1]), np.array([False, False, True])),
        "semantic_segmentation": Mask(pixels),
    }.get(task)
    train: list[Sample] = [(f"k{n}", image(n), annotation) for n in range(4)]
    classes = () if task == "images" else ("cat", "dog")
    old = pack_set(tmp_path / "set", task, {"train": train}, classes, shard_samples=3)
    card = fix(str(tmp_path / "set"), write(tmp_path, "k1,drop"), tmp_path / "new")
    assert card.splits["train"].class_counts == {
        name: count * 3 // 4 for name, count in old.splits["train"].class_counts.items()
    }
    found, before = content(tmp_path / "new", "train"), content(tmp_path / "set", "train")
    assert found == {key: value for key, value in before.items() if key != "k1"}
    assert not verify(tmp_path / "new").differences


def test_the_shards_are_plain_tar_files(data: Path, tmp_path: Path) -> None:
    fix(str(data), write(tmp_path, "train/0,dog"), tmp_path / "new")
    with tarfile.open(tmp_path / "new" / "train" / "000000.tar") as tar:
        names = tar.getnames()
        assert names[:2] == ["train/0.cls", "train/0.png"]
        file = tar.extractfile("train/0.cls")
        assert file is not None
        assert file.read() == b"1"


def test_nothing_is_written_where_something_is(data: Path, tmp_path: Path) -> None:
    file = write(tmp_path, "train/0,dog")
    with pytest.raises(TesseraError, match="is already a packed data set"):
        fix(str(data), file, data)
    with pytest.raises(TesseraError, match="is not a packed data set"):
        fix(str(tmp_path), file, tmp_path / "new")
    shard = data / "val" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(TesseraError, match=r"shard val/000000.tar of .* checksum differs"):
        fix(str(data), file, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_card_without_corrections_does_not_mention_them(data: Path, tmp_path: Path) -> None:
    """So the digests of all other data sets stay what they are."""
    assert "corrections" not in json.loads((data / "card.json").read_text())
    fix(str(data), write(tmp_path, "train/0,dog"), tmp_path / "new")
    text = (tmp_path / "new" / "card.json").read_text()
    assert len(json.loads(text)["corrections"]) == 1
    assert cards.parse(text, "here").to_json() == text
    changed: Card = cards.parse(text, "here").model_copy(update={"corrections": ()})
    with pytest.raises(TesseraError, match="its digest does not match"):
        cards.parse(changed.to_json(), "here")


ODD = [
    *("a,b", "c;d", 'q"uote', "it's", "x%20y", "#1", "?", "{}", "-rf", "a=b", "100%", "$HOME"),
    *("*", "[x]", "~", "class:x", "drop", "日本語", "🎉", unicodedata.normalize("NFD", "élan")),
]


def test_names_with_any_character_keep_their_labels(
    make_folder: Callable[..., Path], make_image: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_folder(tmp_path / "猫 😀 #1", ODD, 3)
    for number, name in enumerate(ODD):
        make_image(source / name / f"{name}.jpg", seed=90_000 + number)
    card = pack(str(source), tmp_path / "it's 100%", near_duplicates=False)
    assert (card.name, card.classes) == ("猫 😀 #1", tuple(sorted(ODD)))
    old = content(tmp_path / "it's 100%", "train")
    by_label = {label: key for key, (_, _, label) in old.items()}
    following = {key: (label + 1) % len(ODD) for label, key in by_label.items()}
    with (tmp_path / "corrections.csv").open("w", newline="") as file:
        rows = [(key, f"class:{card.classes[label]}") for key, label in following.items()]
        csv.writer(file).writerows([("sample", "action"), *rows])
    old_place, new_place = str(tmp_path / "it's 100%"), tmp_path / "new $x"
    fixed = fix(old_place, tmp_path / "corrections.csv", new_place)
    assert fixed.corrections[0].relabelled == len(ODD)
    assert not verify(str(tmp_path / "new $x")).differences
    for key, (image, _, label) in content(tmp_path / "new $x", "train").items():
        assert (image, label) == (old[key][0], following.get(key, old[key][2]))


def test_a_set_that_is_used_in_place_is_named(tmp_path: Path) -> None:
    """Its shards are somebody else's: they are not copied and never written."""
    for number, split in enumerate(("train", "val")):
        samples = foreign_shards.samples(*range(10 * number, 10 * number + 10))
        foreign_shards.write_tar(tmp_path / "wds" / f"set-{split}-000000.tar", samples)
    in_place.index(str(tmp_path / "wds"), tmp_path / "set", options={})
    with pytest.raises(TesseraError, match=r"has only an index: its shards are those of .*wds"):
        fix(str(tmp_path / "set"), write(tmp_path, "s0001,drop"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
