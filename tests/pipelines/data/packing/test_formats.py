"""Each source is recognised as exactly one format."""

from __future__ import annotations

import shlex
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import sample_sources
from layouts import folders

from models.core.errors import UsageError
from pipelines.data.packing.formats import recognise
from pipelines.data.packing.pack import pack
from pipelines.data.sources import AmbiguousError


def test_a_source_without_a_known_format_is_refused_with_the_reason(
    tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    with pytest.raises(UsageError, match=r"nowhere doesn't exist.* bundled data set: digits"):
        recognise(str(tmp_path / "nowhere"))
    file = tmp_path / "x.zip"
    file.write_bytes(b"PK")
    with pytest.raises(UsageError, match="is a file"):
        recognise(str(file))
    both = make_folder(tmp_path / "both", ["a", "b"], 1)
    (both / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(UsageError, match=r"could be image_folder .* mnist .*--format"):
        recognise(str(both))
    assert recognise("digits")[0] == "digits"


def test_an_unknown_table_is_not_ignored(tmp_path: Path, make_image: Callable[..., Path]) -> None:
    """Otherwise its labels would be lost without a message."""
    for number in range(3):
        make_image(tmp_path / "set" / "img" / f"{number}.png", seed=number)
    table = tmp_path / "set" / "labels.csv"
    table.write_text("datei,klasse\n10.png,a\n11.png,b\n")
    with pytest.raises(AmbiguousError, match=r"labels\.csv, which no format recognises") as caught:
        recognise(str(tmp_path / "set"))
    assert [reading.format for reading in caught.value.readings] == ["csv", "images"]
    with pytest.raises(UsageError, match="is not a table") as given:
        recognise(str(table))
    assert "--format csv" in (given.value.hint or "")
    table.write_text("datei,klasse\n0.png,a\n1.png,b\n2.png,b\n")  # the control
    for source in (table, tmp_path / "set"):
        name, why = recognise(str(source))
        assert (name, why) == ("csv", "paths and labels in labels.csv (columns datei and klasse)")
    table.unlink()
    assert recognise(str(tmp_path / "set"))[0] == "images"


def test_two_readings_are_commands_to_paste(
    tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    source = make_folder(tmp_path / "my photos", ["x/cat", "x/dog", "y/emu"], 3)
    with pytest.raises(UsageError, match="which one names the class isn't clear") as caught:
        pack(str(source), tmp_path / "o'ut")
    assert not list(tmp_path.glob(".*"))  # nothing is left behind
    first, *lines = caught.value.hint.splitlines()
    assert first == "choose one:"
    outcomes = {}
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[:3] == ["tessera", "pack", str(source)]
        given = dict(word.split("=") for word in words if "=" in word)
        to = f"{words[4]}-{len(outcomes)}"
        outcomes[given["class_from"]] = pack(words[2], to, format=words[6], options=given).classes
    assert outcomes == {
        "parent": ("x", "y"),
        "leaf": ("cat", "dog", "emu"),
        "path": ("x/cat", "x/dog", "y/emu"),
    }


MADE: Mapping[str, Callable[[Path], Path]] = {
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


@pytest.mark.parametrize("name", list(MADE))
@pytest.mark.parametrize("around", ["", "inner"])
def test_a_source_is_recognised_as_its_format_only(tmp_path: Path, name: str, around: str) -> None:
    folder = MADE[name](tmp_path / "set" / around)
    if around and name in ("coco", "csv", "instance_masks", "medmnist"):
        folder = tmp_path / "set" / around  # these are not looked for in folders below
    else:
        folder = tmp_path / "set"
    assert recognise(str(folder))[0] == name


REAL = {
    "bccd": ("BCCD.tar", "voc"),
    "cifar10-jpeg": ("cifar10-jpeg.tar.gz", "image_folder"),
    "dsb2018-fluorescence": ("dsb2018-fluorescence.tar.gz", "instance_masks"),
    "isbi-membrane": ("membrane.tar", "masks"),
    "sr-bsd68-set5": ("CBSD68.tar", "images"),
}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("dataset", list(REAL))
def test_the_real_data_sets_are_recognised_by_file_names_alone(
    tmp_path: Path, dataset: str
) -> None:
    """The files are empty, at most 30 per folder: recognising a format reads no image."""
    name, form = REAL[dataset]
    archive = sample_sources.DATA / dataset / name
    if not archive.is_file():
        pytest.skip(f"{dataset} is not here")
    with tarfile.open(archive) as tar:
        seen: Counter[Path] = Counter()
        for member in tar:
            path = tmp_path / member.name
            seen[path.parent] += member.isfile()
            if member.isfile() and seen[path.parent] <= 30:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    root = tmp_path / "CBSD68" if form == "images" else tmp_path
    assert recognise(str(root))[0] == form


def test_object_masks_with_a_coco_file_are_read_as_coco(tmp_path: Path) -> None:
    folder = sample_sources.instance_masks(tmp_path / "stage1_train").parent
    assert recognise(str(folder))[0] == "instance_masks"
    (folder / "instances_train.json").write_text("{}")
    assert recognise(str(folder))[0] == "coco"
