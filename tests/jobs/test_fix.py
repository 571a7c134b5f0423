"""`tessera fix` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

from cli_runner import Call
from packed_sets import Sample, pack_set
from PIL import Image

from pipelines.data import card as cards
from pipelines.data.card import Card


def pack(folder: Path) -> Card:
    """12 images of three classes in each of train and test."""
    splits: dict[str, list[Sample]] = {
        split: [(f"{split}{n}", Image.new("L", (4, 4), n + start), n % 3) for n in range(12)]
        for split, start in (("train", 0), ("test", 100))
    }
    return pack_set(folder, "classification", splits, ("a", "b", "c"))


def test_the_corrections_are_shown_by_fix_and_inspect(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "set"
    card = pack(folder)
    file = tmp_path / "corrections.csv"
    file.write_text("sample,split,action\ntrain0,train,b\ntest1,test,drop\n")
    done = call("fix", folder, file, "--to", tmp_path / "new")
    assert done.status == 0, done.err
    assert f"fixed   {tmp_path / 'new'}: 1 relabelled, 1 dropped" in done.out
    assert f"of      {folder}, digest {card.digest}" in done.out
    assert f"next: tessera inspect {tmp_path / 'new'}" in done.err
    shown = call("inspect", tmp_path / "new").out
    made = cards.read(tmp_path / "new").corrections[0]
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "correction 1 1 relabelled, 1 dropped" in lines
    assert f"correction 1 of data set {card.digest}" in lines
    assert f"correction 1 by file with sha256 {made.file_sha256}" in lines
    assert "correction" not in call("inspect", folder).out
    page = tmp_path / "page.html"
    call("inspect", tmp_path / "new", "--html", page)
    for text in ("1 relabelled, 1 dropped", card.digest, made.file_sha256):
        assert text in page.read_text()


def test_a_wrong_correction_is_one_line_with_a_hint(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "set"
    pack(folder)
    file = tmp_path / "corrections.csv"
    file.write_text("sample,split,action\ntrain0,train,bb\n")
    done = call("fix", folder, file, "--to", tmp_path / "new")
    assert done.status == 2
    first, second = done.err.splitlines()
    assert first == f"tessera: {file}, line 2: unknown class 'bb'"
    assert "did you mean 'b'?" in second
    assert not (tmp_path / "new").exists()
    file.write_text("sample,split,action\ntrain0,train,b\n")
    done = call("fix", folder, file, "--to", tmp_path / "new", "--json")
    assert json.loads(done.out)["corrections"][0]["relabelled"] == 1
