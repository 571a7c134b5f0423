"""From a source to a data set: complete, reproducible, and every invalid input is reported."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.core.errors import TesseraError, UsageError
from pipelines.data import card as cards
from pipelines.data import shards
from pipelines.data.image_formats import sniff
from pipelines.data.images import decode_image
from pipelines.data.inspection.verify import verify
from pipelines.data.packing.pack import pack
from pipelines.data.shards import Stored

MakeFolder = Callable[..., Path]
MakeImage = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def samples_of(folder: Path, split: str) -> list[Stored]:
    reader = shards.ShardReader(folder, cards.read(folder), split)
    return [reader.read(i) for i in range(len(reader))]


def left_behind(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if "packing" in p.name or p.name == "out"]


def test_a_folder_of_classes_is_packed_completely(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 20)
    card = pack(str(source), tmp_path / "out")
    assert cards.read(tmp_path / "out") == card
    assert card.classes == ("cat", "dog")
    assert (card.name, card.source) == ("pets", "image_folder:pets")
    assert {name: split.class_counts for name, split in card.splits.items()} == {
        "train": {"cat": 16, "dog": 16},
        "val": {"cat": 2, "dog": 2},
        "test": {"cat": 2, "dog": 2},
    }
    packed = [sample for split in card.splits for sample in samples_of(tmp_path / "out", split)]
    assert len(packed) == 40
    for sample in packed:
        assert sample.image == (source / f"{sample.key}.jpg").read_bytes()
        assert card.classes[sample.label] == sample.key.split("/")[0]
    assert not verify(tmp_path / "out").differences
    assert left_behind(tmp_path) == ["out"]


def test_the_same_input_is_packed_to_the_same_bytes(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    one = make_folder(tmp_path / "a" / "pets", ["cat", "dog"], 12)
    two = make_folder(tmp_path / "b" / "pets", ["dog", "cat"][::-1], 12)
    for path in two.rglob("*"):
        os.utime(path, (0, 0))
    cards_ = [
        pack(str(s), tmp_path / f"out-{n}", shard_samples=5) for n, s in enumerate((one, two))
    ]
    assert cards_[0] == cards_[1]
    assert contents(tmp_path / "out-0") == contents(tmp_path / "out-1")
    other = pack(str(one), tmp_path / "out-2", seed=1)
    assert other.digest != cards_[0].digest


def test_mean_and_std_are_computed_from_the_train_pixels(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 10)
    card = pack(str(source), tmp_path / "out")
    pixels = np.concatenate(
        [
            decode_image(sample.image, 3).numpy().reshape(3, -1) / 255
            for sample in samples_of(tmp_path / "out", "train")
        ],
        axis=1,
    )
    np.testing.assert_allclose(card.image.mean, pixels.mean(1), rtol=1e-12)
    np.testing.assert_allclose(card.image.std, pixels.std(1), rtol=1e-12)
    sizes = (
        card.image.min_height,
        card.image.max_height,
        card.image.min_width,
        card.image.max_width,
    )
    assert sizes == (6, 6, 8, 8)


def test_grey_images_have_one_channel_and_mixed_ones_three(
    tmp_path: Path, make_image: MakeImage
) -> None:
    for number in range(6):
        make_image(tmp_path / "grey" / "a" / f"{number}.png", number, mode="L")
        make_image(tmp_path / "mixed" / "a" / f"{number}.png", number, mode="L")
    make_image(tmp_path / "mixed" / "a" / "6.png", 6)
    grey = pack(str(tmp_path / "grey"), tmp_path / "out-grey").image
    mixed = pack(str(tmp_path / "mixed"), tmp_path / "out-mixed").image
    assert (grey.channels, len(grey.mean), mixed.channels, len(mixed.std)) == (1, 1, 3, 3)
    pixels = [
        decode_image(sample.image, 3).numpy().reshape(3, -1) / 255
        for sample in samples_of(tmp_path / "out-mixed", "train")
    ]
    np.testing.assert_allclose(mixed.mean, np.concatenate(pixels, 1).mean(1), rtol=1e-12)


def test_other_formats_become_png_whatever_their_extension(
    tmp_path: Path, make_image: MakeImage
) -> None:
    folder = tmp_path / "src" / "a"
    true = {}
    for seed, suffix in enumerate((".bmp", ".tif", ".png", ".gif")):
        path = make_image(folder / f"x{suffix[1:]}{suffix}", seed, mode="L")
        with Image.open(path) as image:
            true[f"a/{path.stem}"] = np.array(image.convert("L"))
    make_image(folder / "really.png").rename(folder / "named.jpg")
    pack(str(tmp_path / "src"), tmp_path / "out")
    result = {
        sample.key: sample
        for split in cards.read(tmp_path / "out").splits
        for sample in samples_of(tmp_path / "out", split)
    }
    assert {sniff(s.image) for s in result.values()} == {"PNG"}
    assert set(result) == {*true, "a/named"}
    for key, pixels in true.items():
        np.testing.assert_array_equal(decode_image(result[key].image, 1)[0].numpy(), pixels)


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        (["train", "val", "test"], {"train": 20, "val": 20, "test": 20}),
        (["train", "valid", "test"], {"train": 20, "val": 20, "test": 20}),
        (["train", "test"], {"train": 18, "val": 2, "test": 20}),
        (["Train", "validation"], {"train": 18, "val": 20, "test": 2}),
        (["train"], {"train": 16, "val": 2, "test": 2}),
    ],
)
def test_existing_splits_are_kept_and_missing_ones_taken_from_train(
    tmp_path: Path, make_folder: MakeFolder, given: list[str], counts: dict[str, int]
) -> None:
    folders = [f"{split}/{name}" for split in given for name in ("cat", "dog")]
    source = make_folder(tmp_path / "pets", folders, 10)
    card = pack(str(source), tmp_path / "out")
    assert {name: split.samples for name, split in card.splits.items()} == counts
    keys = [s.key for split in card.splits for s in samples_of(tmp_path / "out", split)]
    assert len(set(keys)) == len(keys) == 20 * len(given)


def test_each_shard_has_a_mixture_of_classes(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 40)
    pack(str(source), tmp_path / "out", shard_samples=16)
    train = samples_of(tmp_path / "out", "train")
    for at in range(0, 64, 16):
        assert len({sample.label for sample in train[at : at + 16]}) == 2


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "a").mkdir(parents=True)
    (source / "a" / "notes.txt").write_text("x")
    with pytest.raises(TesseraError, match=r"src has no images\. images are files named"):
        pack(str(source), tmp_path / "out")
    with pytest.raises(TesseraError, match="has no images in class folders"):
        pack(str(source), tmp_path / "out", format="image_folder")
    assert left_behind(tmp_path) == []


@pytest.mark.fault(30)
def test_a_class_missing_in_train_is_refused(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "pets", ["train/cat", "test/cat", "test/emu"], 3)
    with pytest.raises(TesseraError, match="test has the class 'emu', train doesn't"):
        pack(str(source), tmp_path / "out")


@pytest.mark.fault(30)
def test_classes_missing_in_train_can_be_kept_for_test(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog", "emu", "owl, snowy"], 10)
    messages: list[str] = []
    unseen = ["owl, snowy", "emu"]
    card = pack(str(source), tmp_path / "out", unseen=unseen, notify=messages.append)
    assert card.classes == ("cat", "dog", "emu", "owl, snowy")
    assert {name: list(split.class_counts.values()) for name, split in card.splits.items()} == {
        "train": [8, 8, 0, 0],
        "val": [1, 1, 0, 0],
        "test": [0, 0, 1, 1],
    }
    assert card.source == "image_folder:pets, unseen: emu, owl, snowy"
    assert messages[-1] == (
        "test has the classes emu, owl, snowy and no others, train and val have the rest: "
        "20 images are left out"
    )
    assert not verify(tmp_path / "out").differences
    pack(str(source), tmp_path / "again", unseen=["emu,emu", "owl, snowy"], shard_samples=3)
    pack(str(source), tmp_path / "same", unseen=unseen, shard_samples=3)
    assert contents(tmp_path / "again") == contents(tmp_path / "same")
    assert {s.label for s in samples_of(tmp_path / "same", "test")} == {2, 3}


def test_invalid_unseen_classes_are_refused(
    tmp_path: Path, make_folder: MakeFolder, make_image: MakeImage
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 4)
    with pytest.raises(UsageError, match=r"unknown class 'dig'\. did you mean 'dog'"):
        pack(str(source), tmp_path / "out", unseen=["cat,dig"])
    make_image(tmp_path / "plain" / "1.jpg")
    with pytest.raises(
        UsageError, match="--unseen needs a classification data set, this one is for images"
    ):
        pack(str(tmp_path / "plain"), tmp_path / "out", unseen=["cat"])
    pack(str(source), tmp_path / "shards")
    tars = str(tmp_path / "shards" / "train")
    with pytest.raises(UsageError, match="uses the shards in place"):
        pack(tars, tmp_path / "out", format="webdataset", unseen=["cat"])
    assert left_behind(tmp_path) == []


def test_new_splits_and_a_restart_are_reported(
    tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    source = make_folder(tmp_path / "src", ["train/a", "train/b", "val/a", "val/b"])
    messages: list[str] = []
    pack(str(source), tmp_path / "out", notify=messages.append)
    assert "the source has no test split: taken from train, a tenth of it" in messages
    (source / "train" / "a" / "000.jpg").write_bytes(b"x")
    with pytest.raises(TesseraError, match="unreadable image: 1"):
        pack(str(source), tmp_path / "new", notify=messages.append)
    assert not any(line.startswith("starting again") for line in messages)
    pack(str(source), tmp_path / "new", seed=1, allow_rejected="1", notify=messages.append)
    assert any(line.startswith("starting again") for line in messages)
