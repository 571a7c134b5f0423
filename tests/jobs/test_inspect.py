"""`tessera inspect` as a user runs it."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_runner import Call
from packed_sets import Sample, pack_set, pair
from PIL import Image

from pipelines.data.annotations import Mask, Objects
from pipelines.storage.base import CacheSettings, use_cache
from pipelines.storage.open import open_storage

ROWS = [
    {"key": "a", "origin": "a.jpg", "reason": "box without area", "detail": "object 4"},
    {"key": "b", "origin": "b.jpg", "reason": "box without area", "detail": "object 1"},
    {"key": "c", "origin": "c.jpg", "reason": "unreadable image", "detail": "cut short"},
]


def image(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 30), dtype=np.uint8)
    return Image.fromarray(pixels)


def said_of(task: str) -> object:
    mask = np.zeros((20, 30), np.uint8)
    mask[:5] = 1
    boxes = np.array([[1, 1, 9, 9], [2, 2, 5, 5.0], [3, 3, 8, 9]])
    objects = Objects(boxes, np.array([0, 0, 1]), np.array([False, False, True]))
    return {
        "detection": objects,
        "semantic_segmentation": Mask(mask),
        "classification": 1,
        "images": None,
    }[task]


def make(folder: Path, task: str, **more: object) -> Path:
    classes = () if task == "images" else ("cat", "dog")
    given: list[Sample] = [(f"k{n}", image(n), said_of(task)) for n in range(6)]  # type: ignore[misc]
    splits = {"train": given[:4], "test": given[4:]}
    pack_set(folder, task, splits, classes, shard_samples=3, **more)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize(
    ("task", "lines"),
    [
        ("classification", ["images of train test", "cat 0 0", "dog 4 2"]),
        ("detection", ["objects of train test", "cat 8 4", "dog 0 0"]),
        (
            "semantic_segmentation",
            ["share of the pixels of train test", "cat 75.00 % 75.00 %", "dog 25.00 % 25.00 %"],
        ),
        ("images", ["task images"]),
    ],
)
def test_every_task_has_its_summary(
    tmp_path: Path, call: Call, task: str, lines: list[str]
) -> None:
    folder = make(tmp_path / "set", task, licence="CC0")
    done = call("inspect", folder)
    assert done.status == 0, done.err
    shown = [" ".join(line.split()) for line in done.out.splitlines()]
    for line in [*lines, "images 6", "pixels grey, height 20, width 30", "licence CC0"]:
        assert line in shown
    assert any(line.startswith("train 4 2 ") for line in shown)
    assert ("cat" in done.out) == (task != "images")


def test_rejected_samples_and_near_duplicates_are_counted(tmp_path: Path, call: Call) -> None:
    pairs = [pair(("train", "k0"), ("test", "k4"), 3)]
    folder = make(tmp_path / "set", "classification", rejected=ROWS, pairs=pairs)
    shown = [" ".join(line.split()) for line in call("inspect", folder).out.splitlines()]
    assert "rejected 3: 2 box without area, 1 unreadable image; see rejected.jsonl" in shown
    assert (
        "leakage 1 near-duplicate pair of 2 images across splits; see near_duplicates.jsonl"
        in shown
    )


def test_the_page_is_written_completely(tmp_path: Path, call: Call) -> None:
    folder = make(tmp_path / "set", "detection", rejected=ROWS)
    page = tmp_path / "deep" / "a: page.html"
    done = call("inspect", folder, "--html", page, "--samples", 2)
    assert done.status == 0, done.err
    assert str(page) in done.out
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    assert html.rstrip().endswith("</html>")
    assert html.count("<img ") == 4
    assert [path.name for path in page.parent.iterdir()] == [page.name]
    call("inspect", folder, "--html", page, "--samples", 1)
    assert page.read_text(encoding="utf-8").count("<img ") == 2


def test_json_prints_the_card_also_with_a_page(tmp_path: Path, call: Call) -> None:
    folder = make(tmp_path / "set", "semantic_segmentation")
    done = call("inspect", folder, "--json", "--html", tmp_path / "page.html")
    assert json.loads(done.out) == json.loads((folder / "card.json").read_text())
    assert (tmp_path / "page.html").is_file()


def test_a_remote_data_set_is_inspected_like_a_local_one(tmp_path: Path, call: Call) -> None:
    folder = make(tmp_path / "set", "detection", rejected=ROWS)
    storage = open_storage("memory://inspected/set")
    for path in folder.rglob("*.*"):
        storage.write(path.relative_to(folder).as_posix(), path.read_bytes())
    here, there = tmp_path / "here.html", tmp_path / "there.html"
    use_cache(CacheSettings(tmp_path / "cache"))
    try:
        remote = call("inspect", "memory://inspected/set", "--html", there)
    finally:
        use_cache(None)
    local = call("inspect", folder, "--html", here)
    assert remote.status == 0, remote.err
    assert remote.out.replace(str(there), "") == local.out.replace(str(here), "")
    assert there.read_text(encoding="utf-8") == here.read_text(encoding="utf-8")


def test_many_classes_are_abbreviated(tmp_path: Path, call: Call) -> None:
    given: list[Sample] = [(f"k{n}", image(n), n) for n in range(9)]
    names = [f"class {n}" for n in range(1000)]
    pack_set(tmp_path, "classification", {"train": given}, names)
    done = call("inspect", tmp_path)
    assert "980 classes between" in done.out
    assert len(done.out.splitlines()) < 50


def test_names_are_printed_without_terminal_escapes(tmp_path: Path, call: Call) -> None:
    given: list[Sample] = [("k", image(0), 0)]
    evil = "\x1b]0;title\x07\x1b[2Jred\n\u202eder"
    rows = [{"key": evil, "origin": evil, "reason": evil, "detail": evil}]
    pack_set(
        tmp_path,
        "classification",
        {"train": given},
        [evil],
        rejected=rows,
        **dict.fromkeys(("name", "source", "licence"), evil),
    )
    done = call("inspect", tmp_path)
    assert done.status == 0, done.err
    assert "red" in done.out
    assert not [c for c in done.out if not c.isprintable() and c != "\n"]


def test_errors_are_reported(tmp_path: Path, call: Call) -> None:
    folder = make(tmp_path / "set", "images")
    (tmp_path / "file").write_text("x")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/card.json").write_text("{}")
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("inspect", tmp_path / "none"), 1, "is not a packed data set"),
        (("inspect", tmp_path / "damaged"), 1, "is not a valid card"),
        (("inspect", "pipe:cat x"), 2, "not supported"),
        (("inspect", folder, "--samples", 0), 2, "0"),
        (("inspect", folder, "--html", tmp_path), 2, "is a directory"),
        (("inspect", folder, "--html", tmp_path / "file" / "page.html"), 1, "can't be written"),
    ]
    for arguments, status, part in cases:
        done = call(*arguments)
        assert (done.status, done.out) == (status, ""), arguments
        assert part in done.err
        assert "Traceback" not in done.err


@pytest.mark.slow
def test_suspects_are_listed_shown_and_drafted(
    trained_home: Path, digits: Path, tmp_path: Path, call: Call
) -> None:
    """The draft, with an action filled in, is what `tessera fix` reads."""
    draft, page = tmp_path / "corrections.csv", tmp_path / "page.html"
    words = ("inspect", digits, "--suspects", "digits", "--corrections", draft)
    done = call(*words, "--html", page)
    assert done.status == 0, done.err
    with draft.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert f"suspects  {len(rows)} of 358 images of val, test by models:/digits/1" in done.out
    listed = [line.split() for line in done.out.splitlines()]
    first = rows[0]
    columns = [first[name] for name in ("sample", "split", "class", "suggested", "margin")]
    assert columns in listed
    assert "has no actions yet" in done.err
    assert 'id="suspects"' in page.read_text()
    assert f"margin {first['margin']}" in page.read_text()
    assert call(*words).err.startswith(f"tessera: {draft} exists already")
    found = json.loads(call("inspect", digits, "--suspects", "digits", "--json").out)
    assert [one["sample"] for one in found["suspects"]] == [row["sample"] for row in rows]
    assert "no action in" in call("fix", digits, draft, "--to", tmp_path / "fixed").err
    text = draft.read_text().replace(f"{first['margin']},", f"{first['margin']},drop", 1)
    draft.write_text(text)
    done = call("fix", digits, draft, "--to", tmp_path / "fixed")
    assert "0 relabelled, 1 dropped" in done.out
    done = call("inspect", digits, "--suspects", "digits", "--split", "train")
    assert done.err.startswith("note: the model was trained on these train images")


def test_options_of_suspects_need_a_model(tmp_path: Path, call: Call) -> None:
    folder = make(tmp_path / "set", "classification")
    for option, value in (("--split", "val"), ("--corrections", "x.csv")):
        done = call("inspect", folder, option, value)
        assert (done.status, f"{option} needs --suspects" in done.err) == (2, True)


def test_copies_conflicts_and_files_of_a_source_are_shown(
    make_image: Callable[..., Path], tmp_path: Path, call: Call
) -> None:
    """The same pixels twice as cat, and once as cat and as dog; an archive that nothing uses."""
    source, number = tmp_path / "photos", 0
    for split in ("train", "val", "test"):
        for label in ("cat", "dog"):
            for name in range(3):
                number += 1
                make_image(source / split / label / f"{name}.png", seed=number)
    for label, name in (("cat", "again"), ("dog", "different")):
        shutil.copy(source / "train" / "cat" / "0.png", source / "train" / label / f"{name}.png")
    (source / "more.zip").write_bytes(b"PK")
    assert call("pack", source, "--to", tmp_path / "set", "--workers", 0).status == 0
    page = tmp_path / "page.html"
    done = call("inspect", tmp_path / "set", "--html", page)
    shown = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "copies 2 images within a split; see copies.jsonl" in shown
    (conflicts,) = [line for line in shown if line.startswith("conflicts 1 time")]
    assert "train/dog/different.png is dog" in conflicts
    assert "is cat" in conflicts
    assert "files 21 = 20 images + 1 not used (.zip 1)" in shown
    html = page.read_text()
    copies = html[html.index('id="copies"') : html.index('id="rejected"')]
    assert copies.count("<img ") == 3
    assert "1 time the same pixels have different classes" in copies
    assert [name in copies for name in ("train/cat/again", "train/dog/different")] == [True, True]
    files = html[html.index('id="files"') :]
    assert "not used: .zip" in files
    # The control: a set without copies has neither.
    done = call("inspect", make(tmp_path / "other", "classification"), "--html", page)
    assert "copies.jsonl" not in done.out
    assert 'id="copies"' not in page.read_text()
