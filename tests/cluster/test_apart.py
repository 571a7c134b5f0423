"""A cluster whose machines share no folder: what is refused without an object store, and what an
evaluation and a search do with one. Machines that die in a training
are in test_faults.py.

The tests run in this order, on one cluster: the last one ends it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import cluster_lab
import pytest
from cluster_lab import DATA, STORAGE, Cluster

TRAIN = f"tessera submit train cnn --data {DATA} --workers 2 --epochs 4"
TUNE = (
    f"tessera submit tune cnn --data {DATA} --trials 4 --search random --scheduler none "
    f"--set train.epochs=20 --storage {STORAGE}"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_lab.cluster(tmp_path_factory.mktemp("lab"), workers=2) as cluster:
        packed = cluster.user(f"tessera pack digits --to {DATA}")
        assert packed.returncode == 0, packed.stderr
        yield cluster


def test_a_training_that_would_lose_its_files_is_refused(cluster: Cluster) -> None:
    refused = cluster.user(f"{TRAIN} --model none")
    assert refused.returncode == 1
    text = refused.stdout + refused.stderr
    assert "the machines of the cluster don't share" in text
    assert "--storage s3://BUCKET/FOLDER" in text
    assert "epoch 1/4" not in text
    assert cluster.runs("none") == []


def test_a_model_is_trained_evaluated_by_several_machines_and_promoted(cluster: Cluster) -> None:
    for command in (
        f"{TRAIN} --model one --storage {STORAGE}",
        f"tessera submit evaluate one --data {DATA} --workers 2",
        f"tessera submit reproduce one --data {DATA}",
        "tessera submit promote one",
    ):
        done = cluster.user(command, TESSERA_STORAGE=STORAGE)
        assert done.returncode == 0, done.stdout + done.stderr
    (run,) = cluster.runs("one")
    assert {"pictures", "evaluation"} <= set(run.files)


def test_a_search_goes_on_when_all_its_machines_die(cluster: Cluster) -> None:
    searching = cluster.start(TUNE, log="search.log")
    cluster.wait_for_log("search.log", "trial 1/4 finished")
    (name,) = re.findall(r"^search (\S+)", cluster.lab.log("search.log"), re.MULTILINE)
    cluster.replace_head(workers=2)
    assert cluster_lab.end_of(searching, timeout_seconds=240) == 1
    resumed = cluster.user(f"tessera submit tune --resume {name} --storage {STORAGE}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    trials = [run for run in cluster.runs() if "tessera.trial" in run.tags]
    assert len(trials) == 4
    for trial in trials:
        assert trial.status == "FINISHED"
        assert trial.points == list(range(1, 21))
