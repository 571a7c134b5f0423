"""`tessera pack` and `tessera inspect` as a user runs them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from cli_runner import Call
from PIL import Image


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for at, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.full((5, 7, 3), 20 * number + at, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.png")
    return tmp_path / "pets"


def test_pack_then_inspect(tmp_path: Path, pets: Path, call: Call) -> None:
    packed = call("pack", pets, "--to", tmp_path / "out", "--shard-samples", 6)
    assert packed.status == 0, packed.err
    assert packed.err.splitlines() == [
        f"reading {pets} as image_folder: 2 class folders",
        "classification: 20 images; 2 classes: cat 10, dog 10",
        "files: 20 = 20 images",
    ]
    assert "classes 2 (cat 10, dog 10)" in " ".join(packed.out.split())
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["digest"] in packed.out
    assert "train 16, val 2, test 2" in packed.out

    shown = call("inspect", tmp_path / "out")
    assert shown.status == 0, shown.err
    for part in (card["digest"], "RGB, height 5, width 7", "image_folder:pets", "dog"):
        assert part in shown.out
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["train", "16", "3"] in [line[:3] for line in lines]
    assert ["cat", "8", "1", "1"] in lines

    as_json = call("inspect", tmp_path / "out", "--json")
    assert json.loads(as_json.out) == card


def test_pack_prints_the_card_as_json(tmp_path: Path, pets: Path, call: Call) -> None:
    packed = call("pack", pets, "--to", tmp_path / "out", "--name", "mine", "--json")
    card = json.loads(packed.out)
    assert card == json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["name"] == "mine"


def test_pack_stores_the_licence_and_shrinks_images(tmp_path: Path, pets: Path, call: Call) -> None:
    shrink = ("--resize", 3, "--quality", 80)
    packed = call("pack", pets, "--to", tmp_path / "out", "--licence", "CC0", *shrink, "--json")
    card = json.loads(packed.out)
    assert card["licence"] == "CC0"
    assert (card["image"]["max_height"], card["image"]["max_width"]) == (3, 4)


def test_pack_writes_to_an_address(tmp_path: Path, pets: Path, call: Call) -> None:
    packed = call("pack", pets, "--to", f"file://{tmp_path}/out")
    assert packed.status == 0, packed.err
    assert (tmp_path / "out" / "card.json").exists()


def test_pack_accepts_options_of_the_format(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    rows = ["file;kind"]
    for number in range(6):
        Image.fromarray(np.full((4, 4), 40 * number, np.uint8)).save(folder / f"{number}.png")
        rows.append(f"{number}.png;{'ab'[number % 2]}")
    (folder / "list.csv").write_text("\n".join(rows))
    given = ("--option", "path_column=file", "--option", "label_column=kind")
    given += ("--option", "delimiter=;")
    packed = call("pack", folder, "--to", tmp_path / "out", "--format", "csv", *given, "--json")
    assert packed.status == 0, packed.err
    assert json.loads(packed.out)["classes"] == ["a", "b"]
    near = call(
        "pack", folder, "--to", tmp_path / "x", "--format", "csv", "--option", "paht_column=x"
    )
    assert near.status == 2
    assert "did you mean 'path_column'" in near.err


def test_a_refused_pack_continues_with_allow_rejected(
    tmp_path: Path, pets: Path, call: Call
) -> None:
    (pets / "dog" / "bad.jpg").write_bytes(b"x")
    refused = call("pack", pets, "--to", tmp_path / "out", "--shard-samples", 6)
    assert refused.status == 1
    assert f"{tmp_path}/.out.packing/rejected.jsonl" in refused.err
    again = call(
        "pack", pets, "--to", tmp_path / "out", "--shard-samples", 6, "--allow-rejected", 1
    )
    assert again.status == 0, again.err
    assert "resuming: 5 of 5 shards are packed already" in again.err
    assert "1, see rejected.jsonl" in again.out


def test_pack_keeps_classes_that_only_test_has(tmp_path: Path, pets: Path, call: Call) -> None:
    packed = call("pack", pets, "--to", tmp_path / "out", "--unseen", "dog")
    assert packed.status == 0, packed.err
    assert "train 8, val 1, test 1" in packed.out
    assert "10 images are left out" in packed.err
    assert f"tessera train embedding --data {tmp_path}/out" in packed.out
    near = call("pack", pets, "--to", tmp_path / "x", "--unseen", "cat,dig")
    assert near.status == 2
    assert "did you mean 'dog'" in near.err


def test_errors_are_two_lines_and_an_exit_status(tmp_path: Path, pets: Path, call: Call) -> None:
    (pets / "dog" / "bad.jpg").write_bytes(b"x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    out = tmp_path / "out"
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("pack", pets, "--to", out), 1, "images can't be packed"),
        (("pack", pets, "--to", tmp_path / "full"), 1, "is not empty"),
        (("pack", tmp_path / "no", "--to", out), 2, "doesn't exist"),
        (("pack", pets, "--to", out, "--format", "minst"), 2, "did you mean 'mnist'"),
        (("pack", pets, "--to", out, "--format", "images:x"), 2, "takes no options"),
        (("pack", pets, "--to", out, "--option", "x"), 2, "is not of the form NAME=VALUE"),
        (("pack", pets, "--to", out, "--quality", 90), 2, "--quality needs --resize"),
        (("pack", pets, "--to", "pipe:cat"), 2, "pipe"),
        (("inspect", tmp_path / "full"), 1, "is not a packed data set"),
    ]
    for arguments, status, says in cases:
        done = call(*arguments)
        assert done.status == status, done.err
        assert says in done.err
        assert "Traceback" not in done.err
        assert not done.out
    assert not out.exists()


def test_inspect_reports_a_truncated_shard(tmp_path: Path, pets: Path, call: Call) -> None:
    assert call("pack", pets, "--to", tmp_path / "out").status == 0
    shard = tmp_path / "out" / "train" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    done = call("inspect", tmp_path / "out")
    assert done.status == 1
    assert "train/000000.tar" in done.err


@pytest.mark.parametrize("mask", [0, 0o002, 0o077])
def test_nobody_else_may_change_what_is_written_whatever_the_umask(
    call: Call, tmp_path: Path, mask: int
) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "control").mkdir()
        assert call("pack", "digits", "--to", tmp_path / "out").status == 0
    finally:
        os.umask(before)
    assert (tmp_path / "control").stat().st_mode & 0o777 == 0o777 & ~mask
    written = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(written) > 5
    for path in written:
        assert not path.stat().st_mode & (0o002 | mask), path
