"""The same image in two splits of a source is kept in the later one, near duplicates are listed;
where the splits are cut from train, both stay together."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data import card as cards
from pipelines.data import shards
from pipelines.data.card import Card
from pipelines.data.importers import image_folder
from pipelines.data.inspection.verify import verify
from pipelines.data.packing import near_duplicates, statistics
from pipelines.data.packing.pack import pack
from pipelines.data.packing.plan import split_items

MakeImage = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def keys(folder: Path, split: str) -> set[str]:
    reader = shards.ShardReader(folder, cards.read(folder), split)
    return {reader.read(number).key for number in range(len(reader))}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scene(seed: int) -> Image.Image:
    """A detailed image whose copies of lower quality are near duplicates."""
    rough = np.random.default_rng(seed).integers(0, 256, (24, 32), dtype=np.uint8)
    return Image.fromarray(rough).resize((64, 48), Image.Resampling.BICUBIC).convert("RGB")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """12 train, 4 val and 4 test images of one class, all different."""
    for split, count, first in (("train", 12, 0), ("val", 4, 100), ("test", 4, 200)):
        folder = tmp_path / "pets" / split / "cat"
        folder.mkdir(parents=True)
        for number in range(count):
            scene(first + number).save(folder / f"{number}.png")
    return tmp_path / "pets"


def copy(source: Path, of: str, to: str, quality: int = 0) -> None:
    with Image.open(source / of) as image:
        if not quality:
            image.save(source / to)
        else:
            out = io.BytesIO()
            image.save(out, format="JPEG", quality=quality)
            (source / to).write_bytes(out.getvalue())


def test_data_without_copies_have_no_near_duplicates(tmp_path: Path, source: Path) -> None:
    card = pack(str(source), tmp_path / "out")
    assert card.leakage == cards.NearDuplicates(near=0, images=0)
    assert not (tmp_path / "out" / near_duplicates.FILE).exists()
    assert card.rejected == 0


@pytest.mark.fault(31)
def test_the_same_image_is_kept_only_in_the_later_split(tmp_path: Path, source: Path) -> None:
    copy(source, "test/cat/1.png", "val/cat/of-test.bmp")  # other bytes, the same pixels
    copy(source, "test/cat/1.png", "train/cat/of-test.bmp")
    copy(source, "val/cat/2.png", "train/cat/of-val.bmp")
    copy(source, "train/cat/5.png", "train/cat/within.bmp")  # no leak: one split
    # One class alone would be taken for images without labels.
    how: dict[str, Any] = {"format": "image_folder", "shard_samples": 5}
    with pytest.raises(statistics.ResumableError, match="image in two splits: 3"):
        pack(str(source), tmp_path / "out", **how)
    messages: list[str] = []
    card = pack(str(source), tmp_path / "out", allow_rejected="3", notify=messages.append, **how)
    assert any(line.startswith("resuming: 5 of 5") for line in messages)
    assert {name: split.samples for name, split in card.splits.items()} == {
        "train": 13,
        "val": 4,
        "test": 4,
    }
    assert card.splits["train"].class_counts == {"cat": 13}
    out = tmp_path / "out"
    assert "test/cat/1" in keys(out, "test")
    assert "val/cat/2" in keys(out, "val")
    assert {"train/cat/5", "train/cat/within"} <= keys(out, "train")
    rows = {row["key"]: row for row in lines(out / statistics.REJECTED)}
    assert set(rows) == {"val/cat/of-test", "train/cat/of-test", "train/cat/of-val"}
    assert {row["reason"] for row in rows.values()} == {"image in two splits"}
    assert rows["train/cat/of-test"]["detail"] == (
        "train/cat/of-test.bmp of train is the same image as test/cat/1.png of test"
    )
    assert not verify(out).differences
    _check_statistics(out, card)


def _check_statistics(out: Path, card: Card) -> None:
    """Samples removed as duplicates aren't counted."""
    from pipelines.data.images import decode_image

    reader = shards.ShardReader(out, card, "train")
    pixels = [
        decode_image(reader.read(n).image, 3).numpy().reshape(3, -1) for n in range(len(reader))
    ]
    np.testing.assert_allclose(card.image.mean, np.concatenate(pixels, 1).mean(1) / 255, rtol=1e-12)


def test_a_data_set_with_copies_has_the_same_bytes_however_it_is_packed(
    tmp_path: Path, source: Path
) -> None:
    for name in ("1", "2", "3"):
        copy(source, f"test/cat/{name}.png", f"train/cat/of-{name}.bmp")
    allowed = {"allow_rejected": "3", "shard_samples": 4}
    pack(str(source), tmp_path / "fresh", **allowed)  # type: ignore[arg-type]
    done: list[int] = []

    def stop(seen: int, total: int) -> None:
        done.append(seen)
        if seen == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(source), tmp_path / "out", progress=stop, **allowed)  # type: ignore[arg-type]
    pack(str(source), tmp_path / "out", **allowed)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_shard_with_only_copies_is_omitted(tmp_path: Path, source: Path) -> None:
    copy(source, "test/cat/1.png", "train/cat/of-test.bmp")
    card = pack(str(source), tmp_path / "out", shard_samples=1, allow_rejected="1")
    assert len(card.splits["train"].shards) == card.splits["train"].samples == 12
    names = {path.name for path in (tmp_path / "out" / "train").iterdir()}
    assert names == {"index.npy", *(Path(s.path).name for s in card.splits["train"].shards)}
    assert keys(tmp_path / "out", "train") == {f"train/cat/{n}" for n in range(12)}


@pytest.mark.fault(31)
def test_near_duplicates_are_listed_and_kept(tmp_path: Path, source: Path) -> None:
    copy(source, "test/cat/1.png", "train/cat/again.jpg", quality=80)
    messages: list[str] = []
    card = pack(str(source), tmp_path / "out", notify=messages.append)
    assert card.leakage == cards.NearDuplicates(near=1, images=2)
    (row,) = lines(tmp_path / "out" / near_duplicates.FILE)
    assert 0 <= row.pop("distance") < 32
    assert row == {
        "left": {"split": "train", "key": "train/cat/again", "origin": "train/cat/again.jpg"},
        "right": {"split": "test", "key": "test/cat/1", "origin": "test/cat/1.png"},
    }
    assert "near duplicates across splits: 1 pairs; see near_duplicates.jsonl" in messages
    assert "train/cat/again" in keys(tmp_path / "out", "train")


def test_the_search_for_near_duplicates_can_be_disabled(tmp_path: Path, source: Path) -> None:
    copy(source, "test/cat/1.png", "train/cat/again.jpg", quality=80)
    copy(source, "test/cat/2.png", "train/cat/same.bmp")
    card = pack(str(source), tmp_path / "out", near_duplicates=False, allow_rejected="1")
    assert card.leakage == cards.NearDuplicates()
    assert card.rejected == 1, "the same image is rejected all the same"


def test_near_duplicates_are_searched_among_the_kept_samples(tmp_path: Path, source: Path) -> None:
    """The nearest to a test image is rejected; the next one is still reported."""
    copy(source, "val/cat/1.png", "train/cat/same.bmp")
    copy(source, "val/cat/1.png", "test/cat/near.jpg", quality=80)
    copy(source, "val/cat/1.png", "train/cat/near.jpg", quality=60)
    pack(str(source), tmp_path / "out", allow_rejected="1")
    result = {
        (row["left"]["key"], row["right"]["key"])
        for row in lines(tmp_path / "out" / near_duplicates.FILE)
    }
    assert result == {
        ("train/cat/near", "val/cat/1"),
        ("train/cat/near", "test/cat/near"),
        ("val/cat/1", "test/cat/near"),
    }


@pytest.fixture
def uncut(tmp_path: Path) -> Path:
    """20 images of each of two classes, without splits; ten of each class are in it twice."""
    for at, name in enumerate(("cat", "dog")):
        folder = tmp_path / "pets" / name
        folder.mkdir(parents=True)
        for number in range(20):
            scene(100 * at + number).save(folder / f"{number}.png")
            if number < 10:
                scene(100 * at + number).save(folder / f"{number} copy.png")
    return tmp_path / "pets"


def splits_of(folder: Path) -> dict[str, str]:
    """Key -> split."""
    return {key: split for split in cards.read(folder).splits for key in keys(folder, split)}


def first_cut(source: Path, seed: int = 0) -> dict[str, str]:
    """Key -> split, if nothing is known of copies."""
    items = image_folder.read(str(source), {}).items
    parts = split_items(items, seed).items()
    return {item.key: split for split, found in parts for item in found}


def test_our_cut_puts_no_copies_apart(tmp_path: Path, uncut: Path) -> None:
    told: list[str] = []
    card = pack(str(uncut), tmp_path / "out", notify=told.append, near_duplicates=False)
    out, first = splits_of(tmp_path / "out"), first_cut(uncut)
    names = [key for key in out if "copy" not in key and f"{key}%20copy" in out]
    assert len(names) == 20
    assert any(first[name] != first[f"{name}%20copy"] for name in names), "the control"
    assert all(out[name] == out[f"{name}%20copy"] for name in names)
    assert (card.rejected, len(out)) == (0, 60)
    assert any("40 images in 20 groups; packing again with each group in" in line for line in told)
    groups = lines(tmp_path / "out" / near_duplicates.COPIES)
    assert sum(len(group["images"]) - 1 for group in groups) == 20
    assert not verify(tmp_path / "out").differences
    for split in ("val", "test"):
        assert card.splits[split].class_counts == {"cat": 3, "dog": 3}


def test_the_cut_of_a_set_without_copies_is_what_it_was(tmp_path: Path, uncut: Path) -> None:
    for path in uncut.glob("*/* copy.png"):
        path.unlink()
    told: list[str] = []
    pack(str(uncut), tmp_path / "out", notify=told.append, seed=3)
    assert splits_of(tmp_path / "out") == first_cut(uncut, seed=3)
    assert not any("groups" in line for line in told)


def test_a_few_near_duplicates_leave_the_cut_as_it_is(digits: Path) -> None:
    """Two pairs of digits look alike; 179 are in val, as many in test."""
    card = cards.read(digits)
    pairs = lines(digits / near_duplicates.FILE)
    assert [pair["left"]["split"] != pair["right"]["split"] for pair in pairs] == [True, True]
    assert card.splits["val"].samples == card.splits["test"].samples == 179


def test_copies_that_the_cut_has_not_put_apart_change_nothing(tmp_path: Path, uncut: Path) -> None:
    apart = True
    while apart:  # removing an image may move others
        first = first_cut(uncut)
        apart = False
        for path in sorted(uncut.glob("*/* copy.png")):
            key = f"{path.parent.name}/{path.stem.removesuffix(' copy')}"
            if first[key] != first[f"{key}%20copy"]:
                path.unlink()
                apart = True
    assert list(uncut.glob("*/* copy.png"))
    pack(str(uncut), tmp_path / "out", near_duplicates=False)
    assert splits_of(tmp_path / "out") == first_cut(uncut)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """5 videos of each of two classes with 6 frames each: near duplicates, none the same."""
    for at, name in enumerate(("cat", "dog")):
        for video in range(5):
            folder = tmp_path / "videos" / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.asarray(scene(100 * at + video)).astype(int)
            for frame in range(6):
                brighter = np.clip(pixels + 2 * frame, 0, 255).astype(np.uint8)
                Image.fromarray(brighter).save(folder / f"{video}-{frame}.png")
    return tmp_path / "videos"


def test_frames_of_a_video_are_in_one_split(tmp_path: Path, videos: Path) -> None:
    card = pack(str(videos), tmp_path / "out")
    assert card.leakage == cards.NearDuplicates()
    by_video: dict[str, set[str]] = {}
    for key, split in splits_of(tmp_path / "out").items():
        by_video.setdefault(key.rpartition("-")[0], set()).add(split)
    assert len(by_video) == 10
    assert all(len(splits) == 1 for splits in by_video.values())
    for split in ("val", "test"):  # a tenth of 5 videos is less than one: the smallest is taken
        assert card.splits[split].class_counts == {"cat": 6, "dog": 6}
    assert len(set(first_cut(videos).values())) == 3, "the control: the first cut has all splits"
    # Without the search for near duplicates the first cut stays.
    pack(str(videos), tmp_path / "unsearched", near_duplicates=False)
    assert splits_of(tmp_path / "unsearched") == first_cut(videos)


@pytest.mark.slow
def test_an_interrupted_pack_that_was_planned_again_has_the_same_bytes(
    tmp_path: Path, videos: Path
) -> None:
    how: dict[str, Any] = {"shard_samples": 20}
    pack(str(videos), tmp_path / "fresh", **how)
    for calls in (1, 2):  # at the last image of the first plan, and of the second
        left = calls

        def stop(done: int, total: int) -> None:
            nonlocal left
            left -= done == total
            if not left:
                raise KeyboardInterrupt

        out = tmp_path / f"out-{calls}"
        with pytest.raises(KeyboardInterrupt):
            pack(str(videos), out, progress=stop, **how)
        told: list[str] = []
        pack(str(videos), out, notify=told.append, **how)
        assert any(line.startswith("resuming") for line in told)
        # What the first plan was for is known from the stopped pack.
        assert any("packing again" in line for line in told) == (calls == 1)
        assert contents(out) == contents(tmp_path / "fresh")


def test_images_that_are_all_alike_stay_cut_and_it_is_said(tmp_path: Path) -> None:
    for name, seed in (("cat", 1), ("dog", 2)):
        (tmp_path / "alike" / name).mkdir(parents=True)
        pixels = np.asarray(scene(seed)).astype(int)
        for frame in range(20):
            brighter = np.clip(pixels + frame, 0, 255).astype(np.uint8)
            Image.fromarray(brighter).save(tmp_path / "alike" / name / f"{frame}.png")
    told: list[str] = []
    pack(str(tmp_path / "alike"), tmp_path / "out", notify=told.append)
    assert splits_of(tmp_path / "out") == first_cut(tmp_path / "alike")
    (line,) = [line for line in told if "too good" in line]
    assert "40 images in 2 groups" in line
    assert "nothing is left for val and test" in line


def test_an_own_test_split_stays_and_only_val_is_cut(tmp_path: Path, videos: Path) -> None:
    (videos / "train").mkdir()
    for name in ("cat", "dog"):
        (videos / name).rename(videos / "train" / name)
        (videos / "test" / name).mkdir(parents=True)
        for frame in range(4):  # of a video that train has, too
            name_of = f"0-{frame}.png"
            (videos / "train" / name / name_of).rename(videos / "test" / name / name_of)
    card = pack(str(videos), tmp_path / "out")
    out = splits_of(tmp_path / "out")
    assert {key for key, split in out.items() if split == "test"} == {
        f"test/{name}/0-{frame}" for name in ("cat", "dog") for frame in range(4)
    }
    by_video: dict[str, set[str]] = {}
    for key, split in out.items():
        if split != "test":
            by_video.setdefault(key.rpartition("-")[0], set()).add(split)
    assert all(len(splits) == 1 for splits in by_video.values())
    assert {"train", "val", "test"} == set(out.values())
    assert card.leakage.near > 0, "those of the source's own splits are listed"


def test_the_same_pixels_of_two_classes_are_named(tmp_path: Path, uncut: Path) -> None:
    for number in range(10):
        (uncut / "cat" / f"{number} copy.png").unlink()
        (uncut / "dog" / f"{number} copy.png").unlink()
    told: list[str] = []
    pack(str(uncut), tmp_path / "control", notify=told.append, near_duplicates=False)
    assert not any("same pixels" in line for line in told)
    assert not (tmp_path / "control" / near_duplicates.COPIES).exists()
    (uncut / "train").mkdir()
    for name in ("cat", "dog"):
        (uncut / name).rename(uncut / "train" / name)
        scene(900).save(uncut / "train" / name / "both.png")
        (uncut / "test" / name).mkdir(parents=True)
        scene(700 + ord(name[0])).save(uncut / "test" / name / "x.png")
        (uncut / "val" / name).mkdir(parents=True)
        scene(600 + ord(name[0])).save(uncut / "val" / name / "x.png")
    pack(str(uncut), tmp_path / "out", notify=told.append, near_duplicates=False)
    (line,) = (line for line in told if line.startswith("the same pixels have different classes"))
    assert "train/cat/both.png is cat" in line
    assert "train/dog/both.png is dog" in line
    (group,) = lines(tmp_path / "out" / near_duplicates.COPIES)
    assert {image["class"] for image in group["images"]} == {"cat", "dog"}
