"""`tessera doctor` on a cluster of machines: each fault is found on the machine that has it.

All tests use one cluster, whose machines share no disk, and each repairs what it breaks. The last
one takes a machine off the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import cluster_lab
import pytest
from cluster_lab import DATA, STORAGE, Cluster

PASSWORD = "MLFLOW_TRACKING_PASSWORD"
MACHINES = {"head", "worker-1", "worker-2"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("lab")
    with cluster_lab.cluster(folder, workers=2) as cluster:
        packed = cluster.user(f"tessera pack digits --to {DATA}")
        assert packed.returncode == 0, packed.stderr
        yield cluster


@pytest.fixture(scope="module")
def login(cluster: Cluster) -> dict[str, str]:
    return cluster.start_secured_mlflow()


Faults = dict[tuple[str, str], str]
"""The details of the checks that failed, by machine and check."""


def diagnose(
    cluster: Cluster, *options: str, **environment: str
) -> tuple[int, Faults, set[tuple[str, str]]]:
    """The exit status, the faults, and all checks that were made."""
    command = f"tessera submit doctor --json --timeout 240 {' '.join(options)}"
    done = cluster.user(command, **environment)
    findings = json.loads(done.stdout[done.stdout.index("[\n") :])
    faults = {(f["machine"], f["check"]): f["detail"] for f in findings if f["state"] == "fail"}
    assert all(f["hint"] for f in findings if f["state"] == "fail")
    return done.returncode, faults, {(f["machine"], f["check"]) for f in findings}


def test_what_only_one_machine_has_is_found_on_the_others(cluster: Cluster) -> None:
    """A data set on the head's disk, and runs on each machine's own."""
    cluster.head.run("tessera pack digits --to /srv/digits", check=True)
    status, faults, checks = diagnose(cluster, "--data /srv/digits")
    assert status == 1
    storage = {(machine, "storage") for machine in MACHINES}
    assert set(faults) == storage | {("worker-1", "data"), ("worker-2", "data")}
    assert "sees no files of head, worker-2" in faults["worker-1", "storage"]
    assert "sees no files of worker-1, worker-2" in faults["head", "storage"]
    assert {(m, c) for m in MACHINES for c in ("data", "mlflow", "network", "clock")} <= checks


def test_nothing_is_wrong_with_an_object_store_and_a_login(
    cluster: Cluster, login: dict[str, str]
) -> None:
    """`submit` sends no password: each machine has the login in a file."""
    rows = f"mlflow_tracking_username = admin\nmlflow_tracking_password = {login[PASSWORD]}"
    machines = (cluster.head, *cluster.workers)
    for machine in machines:
        file = "$HOME/.mlflow/credentials"
        command = f"mkdir -p ~/.mlflow && printf '[mlflow]\n{rows}\n' > {file} && chmod 600 {file}"
        machine.run(command, check=True)
    options = f"--data {DATA} --storage {STORAGE}"
    status, faults, checks = diagnose(cluster, options, **login)
    for machine in machines:
        machine.run("rm ~/.mlflow/credentials", check=True)
    assert (status, faults) == (0, {})
    assert {(m, c) for m in MACHINES for c in ("data", "mlflow", "storage")} <= checks


def test_a_missing_login_of_mlflow_is_found_on_every_machine(
    cluster: Cluster, login: dict[str, str]
) -> None:
    status, faults, _ = diagnose(cluster, MLFLOW_TRACKING_URI=login["MLFLOW_TRACKING_URI"])
    assert status == 1
    assert {key for key in faults if key[1] == "mlflow"} == {(m, "mlflow") for m in MACHINES}


def test_two_machines_that_do_not_reach_each_other_are_named(cluster: Cluster) -> None:
    first, second = cluster.workers
    first.block(second)
    try:
        _, faults, _ = diagnose(cluster)
    finally:
        first.unblock(second)
    assert "can't reach worker-2" in faults["worker-1", "network"]
    assert "can't reach worker-1" in faults["worker-2", "network"]
    assert ("head", "network") not in faults


def test_a_machine_without_a_network_is_named(cluster: Cluster) -> None:
    cluster.workers[1].unplug()
    done = cluster.user("tessera submit doctor --timeout 200")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if "worker-2: ray: " in line]
    assert lines, done.stdout
    assert not [line for line in done.stdout.splitlines() if "worker-1: ray: " in line]
