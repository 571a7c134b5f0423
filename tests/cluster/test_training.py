"""Trainings on machines that share a folder for the runs: from data to a promoted model, and what
survives when machines die. Without a shared folder: test_apart.py and test_faults.py.

The tests run in this order on one cluster, which the last one ends.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import cluster_lab
import pytest
from cluster_lab import DATA, Cluster

TRAIN = f"tessera submit train cnn --data {DATA} --workers 2"
EPOCHS = 60
"""Long enough that a machine can be killed in the middle."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("lab")
    with cluster_lab.cluster(folder, workers=3, shared=True) as cluster:
        packed = cluster.user(f"tessera pack digits --to {DATA}")
        assert packed.returncode == 0, packed.stderr
        yield cluster


def test_a_model_is_trained_registered_evaluated_and_promoted(cluster: Cluster) -> None:
    for command in (
        f"{TRAIN} --epochs 8 --model one",
        f"tessera submit evaluate one --data {DATA}",
        "tessera submit promote one",
    ):
        done = cluster.user(command)
        assert done.returncode == 0, done.stdout + done.stderr
    (run,) = cluster.runs("one")
    assert run.status == "FINISHED"
    assert run.points == list(range(1, 9))


def test_a_training_is_followed_again_when_the_network_is_back(cluster: Cluster) -> None:
    """First the user's machine is cut off, then the head, which the workers reach again in time."""
    training = cluster.start(f"{TRAIN} --epochs {EPOCHS} --model waits", log="waits.log")
    cluster.wait_for_log("waits.log", f"epoch 5/{EPOCHS}")
    for machine, seconds in ((cluster.laptop, 40), (cluster.head, 15)):
        machine.unplug()
        time.sleep(seconds)
        assert training.poll() is None, cluster.lab.log("waits.log")
        machine.plug()
    status = cluster_lab.end_of(training, timeout_seconds=300)
    log = cluster.lab.log("waits.log")
    assert status == 0, log
    assert "workers restarted" not in log
    told = re.findall(rf"^\W*epoch (\d+)/{EPOCHS}", log, re.MULTILINE)
    assert list(map(int, told)) == list(range(1, EPOCHS + 1))
    (run,) = cluster.runs("waits")
    assert run.status == "FINISHED"


def test_a_training_resumes_when_a_machine_dies(cluster: Cluster) -> None:
    training = cluster.start(f"{TRAIN} --epochs {EPOCHS} --model two", log="two.log")
    cluster.wait_for_log("two.log", f"epoch 20/{EPOCHS}")
    cluster.kill(cluster.training_machines()[0])
    status = cluster_lab.end_of(training, timeout_seconds=300)
    log = cluster.lab.log("two.log")
    assert status == 0, log
    assert "resumed from step-" in log
    (run,) = cluster.runs("two")
    assert run.status == "FINISHED"
    assert run.points == list(range(1, EPOCHS + 1))
    assert "pictures" in run.files


def test_a_run_resumes_on_another_cluster_when_the_head_dies(cluster: Cluster) -> None:
    training = cluster.start(f"{TRAIN} --epochs {EPOCHS} --model three", log="three.log")
    cluster.wait_for_log("three.log", f"epoch 20/{EPOCHS}")
    (name,) = re.findall(r"^run (\S+)", cluster.lab.log("three.log"), re.MULTILINE)
    cluster.replace_head(workers=2)
    assert cluster_lab.end_of(training, timeout_seconds=240) == 1
    log = cluster.lab.log("three.log")
    assert f"tessera submit train --resume {name}" in log
    assert "Traceback" not in log
    resumed = cluster.user(f"tessera submit train --resume {name}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    (run,) = cluster.runs("three")
    assert run.status == "FINISHED"
    assert run.points == list(range(1, EPOCHS + 1))
