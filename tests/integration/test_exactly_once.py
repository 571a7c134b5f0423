"""A training on a real Ray uses each sample once per epoch, though its workers are killed.

All workers are killed several times, and each attempt has another number of workers. The sample log
shows which samples were used. `make cluster-test` runs this, because four groups of workers are
started; a killed worker and a killed driver are in `test_training.py`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jobs import train as train_verb
from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.tracking.events import read_events
from pipelines.training import run as training_run
from pipelines.training import sample_log
from pipelines.workflows import train
from pipelines.workflows.context import Context

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

EPOCHS = 8
BATCH = 100
WORKERS = (1, 2, 3, 2)


@pytest.fixture
def home(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    root = tmp_path / ".tessera"
    shutil.move(store, root)
    monkeypatch.setenv("TESSERA_HOME", str(root))
    return root


def events(folder: Path) -> list[dict[str, Any]]:
    log = folder / "events.jsonl"
    return [event for event, _ in read_events(log)] if log.exists() else []


class Killer:
    """Kills all workers of an attempt once the training has reached a step."""

    def __init__(self, step: int, workers: int) -> None:
        self.done = False
        self._step, self._workers = step, workers
        self._known = self._alive()
        self._thread = threading.Thread(target=self._watch)
        self._stop = threading.Event()

    def _alive(self) -> int:
        return sum(e["kind"] == "worker" for folder in self._folders() for e in events(folder))

    def _folders(self) -> list[Path]:
        folder = Context.from_environment().runs_dir
        return list(folder.iterdir()) if folder.is_dir() else []

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            for folder in self._folders():
                happened = events(folder)
                steps = [e["step"] for e in happened if "train/loss" in e.get("values", {})]
                started = [e["pid"] for e in happened if e["kind"] == "worker"][self._known :]
                if len(started) == self._workers and max(steps, default=0) >= self._step:
                    for pid in started:
                        os.kill(pid, signal.SIGKILL)
                    self.done = True
                    return
            time.sleep(0.01)


@pytest.mark.fault(17)
def test_each_sample_is_used_once_when_killed_with_1_2_3_2_workers(
    home: Path, digits: Path
) -> None:
    card = cards.read(digits)
    samples = card.split("train").samples
    assert samples % BATCH
    steps_per_epoch = -(-samples // BATCH)
    recipe = recipes.start("cnn", "tiny").with_overrides(
        {
            "data.path": str(digits),
            "data.digest": card.digest,
            "data.sample_log": True,
            "train.epochs": EPOCHS,
            "train.batch_size": BATCH,
            "train.log_every_steps": 1,
            "checkpoint.every_steps": 4,
            "workers.count": WORKERS[0],
            "workers.max_failures": 0,
        }
    )
    total = EPOCHS * steps_per_epoch
    kills = sorted(random.sample(range(5, total // 2), len(WORKERS) - 1))
    print("killed from step", kills, "of", total)
    with (
        Killer(kills[0], WORKERS[0]) as killer,
        pytest.raises(TesseraError, match="workers failed"),
    ):
        train.train(recipe, progress=False)
    assert killer.done
    name = next(Context.from_environment().runs_dir.iterdir()).name
    for step, workers in zip(kills[1:], WORKERS[1:-1], strict=True):
        arguments = ["--resume", name, "--workers", str(workers), "--json"]
        with Killer(step, workers) as killer, pytest.raises(TesseraError, match="workers failed"):
            train_verb.command.main(arguments, standalone_mode=False)
        assert killer.done
    arguments = ["--resume", name, "--workers", str(WORKERS[-1]), "--json"]
    assert train_verb.command.main(arguments, standalone_mode=False) == 0

    run = training_run.find(Context.from_environment().runs_dir, name)
    files = sorted(path.name for path in (run.folder / sample_log.FOLDER).iterdir())
    ranks = Counter(name.split("-")[0] for name in files)
    assert tuple(ranks.values()) == WORKERS
    used = sample_log.read(run.folder)
    assert sorted(used) == list(range(EPOCHS))
    for epoch, result in used.items():
        assert Counter(result) == Counter(range(samples)), f"epoch {epoch}"
    assert len({tuple(result) for result in used.values()}) == EPOCHS, "two epochs in one order"
