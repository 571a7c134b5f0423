"""A cluster whose machines share no folder, only an object store: nothing is lost with a machine.

The tests run in this order, on one cluster: the last one ends it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import cluster_lab
import pytest
from cluster_lab import DATA, Cluster

STORAGE = "s3://data/storage"
TRAIN = f"tessera submit train cnn --data {DATA} --workers 2"
EPOCHS = 60
"""Long enough that a machine can be killed in the middle."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_lab.cluster(tmp_path_factory.mktemp("lab"), workers=3, shared=False) as cluster:
        packed = cluster.user(f"tessera pack digits --to {DATA}")
        assert packed.returncode == 0, packed.stderr
        yield cluster


def test_a_training_that_would_lose_its_files_is_refused(cluster: Cluster) -> None:
    refused = cluster.user(f"{TRAIN} --epochs 8 --model none")
    assert refused.returncode == 1
    text = refused.stdout + refused.stderr
    assert "the machines of the cluster don't share" in text
    assert "--storage s3://BUCKET/FOLDER" in text
    assert "epoch 1/8" not in text
    assert cluster.runs("none") == []


def test_a_model_is_trained_registered_evaluated_and_promoted(cluster: Cluster) -> None:
    for command in (
        f"{TRAIN} --epochs 8 --model one --storage {STORAGE}",
        f"tessera submit evaluate one --data {DATA}",
        "tessera submit promote one",
    ):
        done = cluster.user(command)
        assert done.returncode == 0, done.stdout + done.stderr
    (run,) = cluster.runs("one")
    assert run.status == "FINISHED"
    assert run.points == list(range(1, 9))
    assert "pictures" in run.files


def test_a_training_resumes_when_a_machine_dies(cluster: Cluster) -> None:
    command = f"{TRAIN} --epochs {EPOCHS} --model two --storage {STORAGE}"
    training = cluster.start(command, log="two.log")
    cluster.wait_for_log("two.log", f"epoch 20/{EPOCHS}")
    cluster.kill(cluster.training_machines()[0])
    status = cluster_lab.end_of(training, timeout_seconds=300)
    log = cluster.lab.log("two.log")
    assert status == 0, log
    assert re.search("resuming from step-|going on from step-", log)
    (run,) = cluster.runs("two")
    assert run.status == "FINISHED"
    assert run.points == list(range(1, EPOCHS + 1))
    assert "pictures" in run.files


def test_a_run_resumes_on_another_cluster_when_all_machines_die(cluster: Cluster) -> None:
    command = f"{TRAIN} --epochs {EPOCHS} --model three --storage {STORAGE}"
    training = cluster.start(command, log="three.log")
    cluster.wait_for_log("three.log", f"epoch 20/{EPOCHS}")
    (name,) = re.findall(r"^run (\S+)", cluster.lab.log("three.log"), re.MULTILINE)
    cluster.replace_head(workers=2)
    assert cluster_lab.end_of(training, timeout_seconds=240) == 1
    resumed = cluster.user(f"tessera submit train --resume {name} --storage {STORAGE}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    (run,) = cluster.runs("three")
    assert run.status == "FINISHED"
    assert run.points == list(range(1, EPOCHS + 1))
    assert "pictures" in run.files
