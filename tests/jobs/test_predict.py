"""`tessera predict`: a line for each input, and files that are complete or absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_runner import Call
from PIL import Image


@pytest.fixture(scope="module")
def home(trained_home: Path) -> Path:
    """A home with one small registered model: `digits`, version 1, `challenger`."""
    return trained_home


def test_an_unwritable_output_is_reported(call: Call, home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    out = tmp_path / "file" / "predictions.jsonl"
    done = call("predict", "digits@challenger", tmp_path / "a.png", "--out", out)
    assert (done.status, done.out, str(out.parent) in done.err) == (1, "", True)
    assert len(done.err.splitlines()) <= 2


def test_an_unreadable_input_has_a_line_of_its_own(call: Call, home: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(good)
    bad.write_bytes(good.read_bytes()[:40])
    inputs = [good, bad, tmp_path / "none.png"]
    for strict, status in ([], 0), (["--strict"], 1):
        done = call("predict", "digits@challenger", *inputs, *strict)
        assert done.status == status
        lines = [json.loads(line) for line in done.out.splitlines()]
        assert [line["path"] for line in lines] == [str(path) for path in inputs]
        assert [set(line) >= {"class", "probability"} for line in lines] == [
            True,
            False,
            False,
        ]
        assert all("error" in line for line in lines[1:])
        assert all((line["model"], line["version"]) == ("digits", 1) for line in lines)
        assert done.err == "2 of 3 inputs couldn't be read; each line says why\n"
    assert call("predict", "digits@challenger", good, "--strict").status == 0
    assert call("predict", "digits@challenger", good.with_name("nothing.png")).status == 1


def test_predictions_are_written_completely_or_not_at_all(
    call: Call, home: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    out = tmp_path / "deep" / "predictions.jsonl"
    folder = tmp_path / "annotated"
    arguments = ("predict", "digits@challenger", tmp_path / "a.png", "--out", out)
    assert call(*arguments, "--annotated", folder).status == 0
    assert [json.loads(line)["version"] for line in out.read_text().splitlines()] == [1]
    assert [path.name for path in folder.iterdir()] == ["a.png"]
    assert [path.name for path in out.parent.iterdir()] == ["predictions.jsonl"]


def test_lists_are_predicted_and_what_is_left_out_is_counted(
    call: Call, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    for name in ("a.png", "b.HEIC", "notes.txt"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "new" / name, format="PNG")
    (tmp_path / "new" / "c.HEIC").write_bytes(b"\0\0\0\x24ftypheic" + bytes(100))
    lines = tmp_path / "list.txt"
    lines.write_text(f"{tmp_path}/new\nhttp://example.org/x.jpg\n")
    done = call("predict", "digits@challenger", "--list", lines)
    found = {Path(row["path"]).name: row for row in map(json.loads, done.out.splitlines())}
    assert list(found) == ["a.png", "b.HEIC", "c.HEIC", "x.jpg"]
    assert [name for name, row in found.items() if "error" in row] == ["c.HEIC", "x.jpg"]
    assert "can't be decoded as HEIF" in found["c.HEIC"]["error"]
    assert "the host example.org is not allowed" in found["x.jpg"]["error"]
    assert done.err.splitlines()[0] == "left out: 1 .txt"


def test_predicting_nothing_is_an_error(call: Call, home: Path, tmp_path: Path) -> None:
    lines = tmp_path / "list.txt"
    lines.write_text("\n")
    done = call("predict", "digits@challenger", "--list", lines)
    assert (done.status, done.out) == (2, "")
    assert "nothing to predict" in done.err
    assert call("predict", "digits@challenger").status == 2
    (tmp_path / "empty").mkdir()
    assert call("predict", "digits@challenger", tmp_path / "empty").status == 1
