"""How an item is written to a shard: unchanged or shrunk, with its annotation, or refused."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data import annotations
from pipelines.data.annotations import Annotation, Mask, Objects
from pipelines.data.image_formats import sniff
from pipelines.data.images import encode_png, open_image
from pipelines.data.packing import shard_records
from pipelines.data.packing.shard import PackSpec, ShardPlan, find_record, pack_shard, prepare
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Item, Source
from pipelines.storage.open import open_storage

ITEM = Item("a", "folder/a.jpg", 1)


def photo(size: tuple[int, int] = (40, 30), form: str = "JPEG", seed: int = 0) -> bytes:
    rough = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(rough).resize(size).save(out, format=form)
    return out.getvalue()


def give(data: bytes, item: Item) -> bytes:
    return data


def say(note: Annotation, item: Item) -> Annotation:
    return note


def spec(
    data: bytes,
    task: str = "classification",
    note: Annotation | None = None,
    resize: int | None = None,
    quality: int | None = None,
    where: str = "",
) -> PackSpec:
    source = Source(
        name="set",
        task=task,
        classes=() if task == "images" else ("cat", "dog"),
        items=(),
        load=partial(give, data),
        annotate=partial(say, note) if note is not None else None,
    )
    return PackSpec(source, where, None, "plan", resize, quality)


@pytest.mark.parametrize(("form", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_without_resize_bytes_are_unchanged(form: str, extension: str) -> None:
    data = photo(form=form)
    sample = prepare(spec(data), ITEM)
    assert sample.packed.image == (extension, data)
    assert sample.packed.note == ("cls", b"1")
    assert (sample.packed.label, sample.counts) == (1, [0, 1])


@pytest.mark.parametrize("resize", [30, 31, 1000])
def test_a_small_image_is_neither_changed_nor_enlarged(resize: int) -> None:
    data = photo((40, 30))
    assert prepare(spec(data, resize=resize, quality=50), ITEM).packed.image == ("jpg", data)


@pytest.mark.parametrize(
    ("size", "resize", "becomes"),
    [((40, 30), 15, (20, 15)), ((30, 40), 15, (15, 20)), ((641, 480), 256, (342, 256))],
)
def test_the_shorter_side_is_resized_and_the_aspect_ratio_kept(
    size: tuple[int, int], resize: int, becomes: tuple[int, int]
) -> None:
    sample = prepare(spec(photo(size), resize=resize), ITEM)
    assert sample.image.size == becomes
    assert open_image(sample.packed.image[1], "x").size == becomes


@pytest.mark.parametrize(
    ("form", "quality", "becomes"),
    [
        ("JPEG", None, "JPEG"),
        ("WEBP", None, "JPEG"),
        ("PNG", None, "PNG"),
        ("BMP", None, "PNG"),
        ("PNG", 80, "JPEG"),
        ("JPEG", 80, "JPEG"),
    ],
)
def test_lossless_images_stay_lossless_unless_a_quality_is_set(
    form: str, quality: int | None, becomes: str
) -> None:
    sample = prepare(spec(photo(form=form), resize=15, quality=quality), ITEM)
    extension, data = sample.packed.image
    assert sniff(data) == becomes
    assert extension == {"JPEG": "jpg", "PNG": "png"}[becomes]


def test_the_quality_is_passed_to_the_jpeg_encoder() -> None:
    data = photo((400, 300))
    sizes = [
        len(prepare(spec(data, resize=150, quality=q), ITEM).packed.image[1])
        for q in (10, 50, None, 98)
    ]
    assert sizes == sorted(sizes)
    ninety = prepare(spec(data, resize=150, quality=90), ITEM).packed.image
    assert ninety == prepare(spec(data, resize=150), ITEM).packed.image


def test_fast_shrinking_agrees_with_a_high_quality_filter() -> None:
    """On average within two levels of the slow method."""
    data = photo((640, 480), form="PNG")
    sample = prepare(spec(data, resize=100), ITEM)
    with Image.open(io.BytesIO(data)) as image:
        slow = image.resize((133, 100), Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(sample.image, np.int64) - np.asarray(slow, np.int64))
    assert difference.mean() < 1


def test_a_rotated_image_is_shrunk_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (40, 30)).save(out, format="JPEG", exif=exif)
    sample = prepare(spec(out.getvalue(), resize=15), ITEM)
    assert sample.image.size == (15, 20)
    assert open_image(sample.packed.image[1], "x").size == (15, 20)


def test_objects_are_scaled_with_their_image() -> None:
    given = Objects(
        boxes=np.array([[4.0, 6.0, 20.0, 30.0]]), labels=np.array([1]), crowd=np.array([False])
    )
    sample = prepare(spec(photo(), "detection", given, resize=15), ITEM)
    assert sample.packed.note is not None
    assert sample.packed.note[0] == "json"
    result = annotations.decode_objects(
        sample.packed.note[1], height=15, width=20, classes=2, where="x"
    )
    np.testing.assert_allclose(result.boxes, [[2.0, 3.0, 10.0, 15.0]])
    assert sample.counts == [0, 1]
    assert sample.packed.label == -1


def test_a_mask_is_scaled_with_its_image() -> None:
    pixels = np.zeros((30, 40), np.uint8)
    pixels[:, 20:] = 1
    sample = prepare(spec(photo(), "semantic_segmentation", Mask(pixels), resize=15), ITEM)
    assert sample.packed.note is not None
    assert sample.packed.note[0] == "mask.png"
    result = annotations.decode_mask(
        sample.packed.note[1], height=15, width=20, classes=2, where="x"
    )
    assert result.pixels[:, :10].max() == 0
    assert result.pixels[:, 10:].min() == 1
    assert sample.counts == [150, 150]


def test_images_without_labels_have_no_annotation() -> None:
    sample = prepare(spec(photo(), "images"), replace(ITEM, label=None))
    assert sample.packed.note is None
    assert sample.counts == []


def fail(message: str, item: Item) -> Annotation:
    raise TesseraError(message)


@pytest.mark.fault(8, 27)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": 2}, "unknown class"),
        ({"label": -1}, "unknown class"),
        ({"label": None}, "unknown class"),
        ({"problem": ("no image", "row 3 names none")}, "no image"),
    ],
)
def test_an_item_that_cannot_be_packed_is_recorded_with_the_reason(
    change: dict[str, object], reason: str
) -> None:
    with pytest.raises(SampleError) as caught:
        prepare(spec(photo()), replace(ITEM, **change))  # type: ignore[arg-type]
    assert caught.value.reason == reason


def boxes(*box: float) -> Objects:
    return Objects(np.array([box]), np.array([0]), np.array([False]))


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize(
    ("note", "reason"),
    [
        (boxes(5, 5, 5, 9), "box without area"),
        (boxes(5, 5, 90, 9), "box outside the image"),
        (Mask(np.zeros((40, 30), np.uint8)), "mask of another size"),
        (Mask(np.full((30, 40), 7, np.uint8)), "unknown class"),
    ],
)
def test_an_invalid_annotation_is_in_the_record(
    tmp_path: Path, note: Annotation, reason: str
) -> None:
    job = spec(photo(), "detection", note, where=str(tmp_path))
    record = pack_shard(job, ShardPlan("train", "train/000000.tar", (ITEM,)))
    assert [(row["key"], row["reason"]) for row in record.rejected] == [("a", reason)]
    assert ITEM.origin in record.rejected[0]["detail"]
    assert record.shard.samples == 0
    assert not (tmp_path / "train").exists()


def test_an_unreadable_annotation_is_distinguished_from_an_unreadable_image(tmp_path: Path) -> None:
    job = spec(photo(), "detection", boxes(1, 1, 2, 2), where=str(tmp_path))
    job = replace(job, source=replace(job.source, annotate=partial(fail, "a.xml is no XML")))
    record = pack_shard(job, ShardPlan("train", "train/000000.tar", (ITEM,)))
    (row,) = record.rejected
    assert (row["reason"], row["detail"]) == ("unreadable annotation", "a.xml is no XML")


def test_a_record_describes_its_shard(tmp_path: Path) -> None:
    job = spec(photo(), where=str(tmp_path))
    items = tuple(Item(key, f"{key}.jpg", label) for key, label in (("a", 1), ("b", 5), ("c", 0)))
    shard_plan = ShardPlan("val", "val/000003.tar", items)
    record = pack_shard(job, shard_plan)
    storage = open_storage(tmp_path)
    assert find_record(job, shard_plan) == record == shard_records.load(storage, shard_plan.path)
    assert shard_records.known(storage) == {shard_plan.path}
    assert record.counts == (1, 1)
    rows = shard_records.load_rows(storage, record)
    assert rows["key"].tolist() == [b"a", b"c"]
    assert rows["label"].tolist() == [1, 0]
    fingerprints = shard_records.load_fingerprints(storage, record)
    assert len(fingerprints) == 2
    np.testing.assert_array_equal(fingerprints[0], fingerprints[1])
    assert find_record(replace(job, plan="other"), shard_plan) is None


def test_a_shard_has_the_bytes_of_its_items(tmp_path: Path) -> None:
    def make(name: str, seed: int) -> bytes:
        job = spec(encode_png(np.full((4, 4), seed, np.uint8)), where=str(tmp_path / name))
        pack_shard(job, ShardPlan("train", "train/000000.tar", (ITEM,)))
        return (tmp_path / name / "train" / "000000.tar").read_bytes()

    assert make("a", 1) == make("b", 1)
    assert make("a", 1) != make("c", 2)
