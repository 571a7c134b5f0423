"""The contract of every importer: options, damaged files, and sources that are sent to
processes."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sample_sources
from layouts import folders
from layouts.box_files import kitti_line, labelme_json
from layouts.box_sets import each
from layouts.more_boxes import one_file_cvat, table, tensorflow_row

from models.core.errors import TesseraError
from pipelines.data import importers
from pipelines.data.annotations import check
from pipelines.data.importers.support.reading import image_size
from pipelines.data.sources import Source


def test_every_importer_describes_its_options(tmp_path: Path) -> None:
    for name in importers.names():
        module = importers.get(name)
        assert name == module.NAME
        assert all(isinstance(text, str) and text for text in module.OPTIONS.values())
        assert not module.recognises(str(tmp_path / "nowhere"))
        assert not module.recognises(str(tmp_path))


def read_all(source: Source) -> None:
    """Reads every item completely, as a pack does."""
    for item in source.items:
        if item.problem:
            continue
        try:
            data = source.load(item)
            size = image_size(data, item.origin)
            if source.annotate:
                height, width = size
                note = source.annotate(item)
                check(
                    note, height=height, width=width, classes=len(source.classes), where=item.origin
                )
        except TesseraError:
            continue


def mutate(data: bytes, dice: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at = dice.randrange(len(raw) + 1)
        kind = dice.randrange(5)
        if kind == 0:
            raw[at : at + 1] = bytes([dice.randrange(256)])
        elif kind == 1:
            raw[at : at + dice.randrange(20)] = b""
        elif kind == 2:
            raw[at:at] = dice.choice((b"[", b"]", b'"', b"\0", b"\xff", b"<", b"&", b"1e999", b"-"))
        elif kind == 3:
            end = at + dice.randrange(50)
            raw[at:at] = raw[at:end] * dice.choice((1, 3))
        else:
            raw[at:] = b""
    return bytes(raw)


HEADER = "filename,width,height,class,xmin,ymin,xmax,ymax\n"


def made_of(build: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        build(folder)
        return folder

    return make


MADE: Mapping[str, Callable[[Path], Path]] = {
    "box_csv": made_of(partial(table, HEADER, tensorflow_row, "labels.csv", "{}.jpg")),
    "cvat": made_of(partial(one_file_cvat, shape="polygon")),
    "kitti": made_of(partial(each, "images/{}.png", "labels/{}.txt", kitti_line)),
    "labelme": made_of(partial(each, "{}.jpg", "{}.json", labelme_json)),
    "cifar10": sample_sources.cifar_python,
    "coco": sample_sources.coco,
    "csv": sample_sources.table,
    "huggingface": folders.objects,
    "instance_masks": sample_sources.instance_masks,
    "masks": sample_sources.masks,
    "medmnist": sample_sources.medmnist,
    "parquet": folders.parquet,
    "voc": sample_sources.voc,
    "yolo": sample_sources.yolo,
}
TARGETS = {
    "box_csv": "labels.csv",
    "cvat": "annotations.xml",
    "kitti": "labels/0.txt",
    "labelme": "0.json",
    "cifar10": "data_batch_1",
    "coco": "annotations/instances_train2017.json",
    "csv": "labels.csv",
    "huggingface": "train/metadata.jsonl",
    "parquet": "data/train-00000-of-00001.parquet",
    "masks": "masks/0.png",
    "medmnist": "pathmnist.npz",
    "voc": "Annotations/2007_000000.xml",
    "yolo": "data.yaml",
    "yolo labels": "labels/train/0.txt",
    "voc lists": "ImageSets/Main/train.txt",
    "cifar10 names": "batches.meta",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", list(TARGETS))
def test_changed_bytes_end_in_an_error_or_a_source(tmp_path: Path, what: str) -> None:
    """Never in another exception, and within limits of time and memory."""
    name = what.split()[0]
    folder = MADE[name](tmp_path / "set")
    path = folder / TARGETS[what]
    whole = path.read_bytes()
    dice = random.Random(what)
    module = importers.get(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, longest = 0, 0.0
    for _ in range(150):
        path.write_bytes(mutate(whole, dice))
        start = time.process_time()
        try:
            module.recognises(str(folder))
            read_all(module.read(str(folder), {}))
        except TesseraError:
            refused += 1
        longest = max(longest, time.process_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert refused or what in ("kitti", "labelme", "masks", "voc", "voc lists", "yolo labels")
    assert longest < 5
    assert grown < 100 << 10  # KiB
    path.write_bytes(whole)
    assert len(module.read(str(folder), {}).items)


def test_the_unchanged_sources_are_read_completely(tmp_path: Path) -> None:
    """Control of the test above: unchanged sources are not refused."""
    for name, make in MADE.items():
        source = importers.get(name).read(str(make(tmp_path / name)), {})
        assert not any(item.problem for item in source.items)
        for item in source.items:
            height, width = image_size(source.load(item), item.origin)
            if source.annotate:
                note = source.annotate(item)
                check(note, height=height, width=width, classes=len(source.classes), where="x")
            assert all(path.is_file() for path in source.files(item))
        assert len({item.origin for item in source.items}) == len(source.items)
        assert len({item.key for item in source.items}) == len(source.items)


def test_sources_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    import pickle

    for name, make in MADE.items():
        source = importers.get(name).read(str(make(tmp_path / name)), {})
        copy = pickle.loads(pickle.dumps(source))
        item = copy.items[0]
        assert copy.load(item) == source.load(source.items[0])
        if source.annotate:
            one, two = source.annotate(item), copy.annotate(item)
            for field in ("boxes", "pixels"):
                if hasattr(one, field):
                    np.testing.assert_array_equal(getattr(one, field), getattr(two, field))


def test_mnist_and_digits_are_not_recognised_as_each_other(tmp_path: Path) -> None:
    sample_sources.write_mnist(tmp_path / "set", {"train": 20, "t10k": 10})
    for name in ("image_folder", "digits"):
        assert not importers.get(name).recognises(str(tmp_path / "set"))
    assert not importers.get("digits").recognises("./digits")
    assert not importers.get("mnist").recognises("digits")
