"""`tessera pack` and `tessera inspect` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from calling import Call
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
    assert packed.err == f"{pets} is read as image_folder: 2 class folders\n"
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


def test_mistakes_are_two_lines_and_a_status(tmp_path: Path, pets: Path, call: Call) -> None:
    (pets / "dog" / "bad.jpg").write_bytes(b"x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    out = tmp_path / "out"
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("pack", pets, "--to", out), 1, "1 of the images can't be packed"),
        (("pack", pets, "--to", tmp_path / "full"), 1, "is not empty"),
        (("pack", tmp_path / "no", "--to", out), 2, "there is no"),
        (("pack", pets, "--to", out, "--format", "minst"), 2, "did you mean 'mnist'"),
        (("inspect", tmp_path / "full"), 1, "is no packed data set"),
    ]
    for arguments, status, says in cases:
        done = call(*arguments)
        assert done.status == status, done.err
        assert says in done.err
        assert "Traceback" not in done.err
        assert not done.out
    assert not out.exists()


def test_inspect_names_a_shard_that_is_cut_short(tmp_path: Path, pets: Path, call: Call) -> None:
    assert call("pack", pets, "--to", tmp_path / "out").status == 0
    shard = tmp_path / "out" / "train" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    done = call("inspect", tmp_path / "out")
    assert done.status == 1
    assert "train/000000.tar" in done.err
