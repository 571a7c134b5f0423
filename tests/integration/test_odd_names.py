"""The whole way in a project whose path, Python, files, classes, data set, model and run have names
with spaces, quotes, letters of other alphabets, emoji, and letters that aren't composed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
PROJECT = "my project's 猫 😀"
DATA = "Café 写真's 😀"
CLASSES = ["chat 猫", "chien's 🐕", unicodedata.normalize("NFD", "élan")]
WAY = """
import importlib, json, os, sys
from pathlib import Path
from pipelines.cluster import connection
from pipelines.workflows import services
from pipelines.workflows.context import Context

def run(verb, *words):
    print("##", verb, flush=True)
    command = importlib.import_module(f"jobs.{verb}").command
    status = command.main([*map(str, words)], standalone_mode=False)
    assert not status, (verb, status)

data, sources = "packed/" + sys.argv[1], "sources/" + sys.argv[1]
services.apply_settings(Context.from_environment())
connection.connect(cpus=4)
short = ["--set", "train.epochs=1", "--set", "model.channels=[2,2]", "--variant", "tiny"]
run("pack", sources, "--to", data, "--workers", 2, "--no-leakage-check")
run("verify", data)
run("inspect", data, "--json")
run("train", "cnn", "--data", data, "--workers", 2, "--run", "run " + sys.argv[1], *short)
Path("space 😀.yaml").write_text("optim.model.lr: [0.01]\\n")
run("tune", "cnn", "--data", data, "--workers-per-trial", 1, "--trials", 1, "--space",
    "space 😀.yaml", "--run", "search " + sys.argv[1], *short)
run("evaluate", sys.argv[1] + "@challenger", "--data", data)
run("registry", sys.argv[1])
images = sorted(Path(sources).rglob("*.jpg"))
run("predict", sys.argv[1], *images[:3], "--out", "predictions 猫.jsonl")
run("export", sys.argv[1], "--format", "pt2", "--out", "model 猫's.pt2")
connection.disconnect()
os._exit(0)
"""


def test_everything_works_under_names_with_any_characters(
    tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    project = tmp_path / PROJECT
    make_folder(project / "sources" / DATA, CLASSES, count=10)
    python = project / "its python" / "bin"
    (project / "its python").symlink_to(sys.prefix)
    done = subprocess.run(
        [str(python / Path(sys.executable).name), "-c", WAY, DATA],
        cwd=project,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))},
            "PYTHONPATH": str(ROOT),
            "TESSERA_HOME": str(project / ".tessera"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    lines = (project / "predictions 猫.jsonl").read_text(encoding="utf-8").splitlines()
    predicted = [json.loads(line) for line in lines]
    assert len(predicted) == 3
    assert (project / "model 猫's.pt2").stat().st_size > 1000
    known = {unicodedata.normalize("NFC", name) for name in CLASSES}
    assert {unicodedata.normalize("NFC", one["class"]) for one in predicted} <= known
    runs = [json.loads(f.read_text()) for f in (project / ".tessera").glob("runs/*/run.json")]
    assert [run["name"] for run in runs] == [f"run {DATA}"]
