"""Trainings on machines that share no folder, in which a machine or a service dies: the small
version of benchmarks/cluster_faults.py."""

from __future__ import annotations

import random
from collections.abc import Iterator

import cluster_lab
import pytest
from training_faults import SPARE_WORKERS, WORKERS, Trainings

EPOCHS = 16
VICTIMS = ("rank 0's machine", "the S3 server", "the driver's machine", "the head")


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    folder = tmp_path_factory.mktemp("lab")
    workers = WORKERS + SPARE_WORKERS
    with cluster_lab.cluster(
        folder, workers=workers, TESSERA_STORAGE=cluster_lab.STORAGE
    ) as cluster:
        packed = cluster.user(f"tessera pack digits --to {cluster_lab.DATA}")
        assert packed.returncode == 0, packed.stderr
        yield Trainings(cluster, epochs=EPOCHS, say=print)


@pytest.fixture(scope="module")
def weights(trainings: Trainings) -> str:
    """Of a training in which nothing dies."""
    outcome = trainings.run("undisturbed")
    assert outcome.faults(EPOCHS, outcome.weights) == []
    return outcome.weights


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_training_ends_as_if_nothing_had_died(
    trainings: Trainings, weights: str, victim: str
) -> None:
    outcome = trainings.run(f"training-{VICTIMS.index(victim)}", victim, random.Random(victim))
    assert outcome.faults(EPOCHS, weights) == [], outcome
