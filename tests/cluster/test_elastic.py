"""Groups of workers that grow and shrink with the cluster, on machines that share no folder.

The tests share one cluster, which has no worker before the first one.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import cluster_lab
import pytest
from cluster_lab import DATA, RAY_PORT, STORAGE, Cluster

EPOCHS = 60
"""With `BATCH`, enough for three changes of the group. It grows half a minute after it began."""
BATCH = 8
SAMPLES = 1_439
PATIENCE_SECONDS = 400.0
"""For what takes half a minute on machines that are not busy."""
TRAIN = f"tessera submit train cnn --data {DATA}"
LEDGER = """
import json
from collections import Counter
from pathlib import Path
from pipelines.storage.open import open_storage
from pipelines.training import sample_log
folder = Path("ledger")
sample_log.fetch(open_storage("{address}"), folder)
used = sample_log.read(folder)
print(json.dumps({{epoch: sorted(Counter(rows).items()) for epoch, rows in used.items()}}))
"""
NODES = """
import json, ray
ray.init(logging_level="ERROR")
print(json.dumps({n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}))
"""
FEW_EPOCHS = 24
"""For a comparison of losses: what the order of additions changes grows with every step."""
LOSS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("lab")
    with cluster_lab.cluster(folder, workers=0, TESSERA_STORAGE=STORAGE) as cluster:
        packed = cluster.laptop.run(f"tessera pack digits --to {DATA}")
        assert packed.returncode == 0, packed.stderr
        yield cluster


def drain(cluster: Cluster, address: str, seconds: int) -> None:
    """Announces that a machine will be taken away, as a cloud does with a spot machine."""
    nodes = json.loads(
        cluster.head.run(f"python - <<'END'\n{NODES}\nEND", check=True).stdout.splitlines()[-1]
    )
    cluster.head.run(
        f"ray drain-node --address {cluster.head.address}:{RAY_PORT} --node-id {nodes[address]}"
        " --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot"
        f" --deadline-remaining-seconds {seconds}",
        check=True,
    )


def have_two_workers(cluster: Cluster) -> None:
    while len(cluster.workers) < 2:
        cluster.add_worker()
    cluster.wait_for_nodes(1 + len(cluster.workers))


def test_a_group_waits_for_machines_then_grows_and_shrinks_and_no_sample_is_lost(
    cluster: Cluster,
) -> None:
    began = time.monotonic()
    command = f"{TRAIN} --workers 1:3 --epochs {EPOCHS} --batch-size {BATCH} --model grows"
    command += " --set data.sample_log=true"
    training = cluster.start(command, log="grows.log")

    cluster.wait_for_log("grows.log", "waiting for 1 worker with 1 CPU each; the cluster has 0 CPU")
    cluster.add_worker()
    cluster.wait_for_log("grows.log", f"epoch 1/{EPOCHS}")
    cluster.add_worker()
    cluster.add_worker()
    cluster.wait_for_log("grows.log", "1 → 3 workers", timeout_seconds=PATIENCE_SECONDS)
    spot = cluster.training_machines()[-1]
    drain(cluster, spot.address, seconds=60)
    cluster.wait_for_log("grows.log", "3 → 2 workers", timeout_seconds=PATIENCE_SECONDS)
    cluster.kill(spot)
    cluster.kill(cluster.training_machines()[0])
    cluster.wait_for_log("grows.log", "2 → 1 workers", timeout_seconds=PATIENCE_SECONDS)
    status = cluster_lab.end_of(training, timeout_seconds=PATIENCE_SECONDS)

    log = cluster.lab.log("grows.log")
    assert status == 0, log
    assert f"{spot.name} is being drained" in log
    assert log.count("workers restarted") == 1, "a machine that was drained is no failure"
    (run,) = cluster.runs("grows")
    assert run.points == list(range(1, EPOCHS + 1))
    assert [run.tags[f"tessera.group.{n}"][:14] for n in (1, 2, 3)] == [
        "1 to 3 workers",
        "3 to 2 workers",
        "2 to 1 workers",
    ]
    seconds = [float(s) for s in re.findall(r"→ \d workers in (\d+) s", log)]
    print(f"formed again in {seconds} s, {time.monotonic() - began:.0f} s in all")
    (name,) = re.findall(r"^run (\S+)", log, re.MULTILINE)
    used = json.loads(cluster.python(LEDGER.format(address=f"{STORAGE}/runs/{name}")))
    assert len(used) == EPOCHS
    once = [[index, 1] for index in range(SAMPLES)]
    wrong = [epoch for epoch, counts in used.items() if counts != once]
    assert not wrong, "samples were lost or used twice"


def test_a_group_that_became_smaller_has_the_losses_of_a_fixed_one(cluster: Cluster) -> None:
    """Of a network without BatchNorm, whose statistics are each worker's own."""
    have_two_workers(cluster)
    command = f"{TRAIN} --variant tiny --epochs {FEW_EPOCHS} --batch-size 96"
    command += " --set train.precision=fp32 --set data.sample_log=true"
    training = cluster.start(f"{command} --workers 1:2 --model smaller", log="smaller.log")
    cluster.wait_for_log("smaller.log", f"epoch 3/{FEW_EPOCHS}")
    cluster.kill(cluster.training_machines()[0])
    status = cluster_lab.end_of(training, timeout_seconds=PATIENCE_SECONDS)
    assert status == 0, cluster.lab.log("smaller.log")
    assert "2 → 1 workers" in cluster.lab.log("smaller.log")
    fixed = cluster.user(f"{command} --workers 1 --model fixed")
    assert fixed.returncode == 0, fixed.stdout + fixed.stderr
    (one,), (other,) = cluster.runs("smaller"), cluster.runs("fixed")
    assert one.points == other.points == list(range(1, FEW_EPOCHS + 1))
    most = max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    print(f"losses differ by at most {most:.1e}")
    assert 0 < most < LOSS_TOLERANCE, "0: the group never had two workers"


def test_a_worker_that_is_told_to_end_is_no_failure_and_one_that_is_stopped_is_named(
    cluster: Cluster,
) -> None:
    have_two_workers(cluster)
    training = cluster.start(f"{TRAIN} --workers 2 --epochs 120 --model stopped", log="stopped.log")
    cluster.wait_for_log("stopped.log", "epoch 5/120")
    cluster.training_machines()[0].run("pkill -TERM -f [R]ayTrainWorker", check=True)
    cluster.wait_for_log("stopped.log", "2 → 2 workers", timeout_seconds=PATIENCE_SECONDS)
    assert "workers restarted" not in cluster.lab.log("stopped.log")

    machine = cluster.training_machines()[0]
    stopped_at = time.monotonic()
    machine.run("pkill -STOP -f [R]ayTrainWorker", check=True)
    cluster.wait_for_log("stopped.log", "has been silent for", timeout_seconds=60)
    print(f"named after {time.monotonic() - stopped_at:.0f} s")
    machine.run("pkill -CONT -f [R]ayTrainWorker", check=True)
    assert cluster_lab.end_of(training, timeout_seconds=PATIENCE_SECONDS) == 0, cluster.lab.log(
        "stopped.log"
    )
    (line,) = re.findall(r"note: (.* has been silent .*)", cluster.lab.log("stopped.log"))
    assert f"on {machine.name}" in line
    assert ".py:" in line


def test_machines_that_cannot_reach_each_other_are_named(cluster: Cluster) -> None:
    have_two_workers(cluster)
    one, other = cluster.workers[:2]
    one.block(other)
    began = time.monotonic()
    done = cluster.user(f"{TRAIN} --workers 2 --epochs 2 --set workers.max_failures=0")
    one.unblock(other)
    print(f"refused after {time.monotonic() - began:.0f} s")
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert re.search(rf"{one.name} \({one.address}, eth0\) can't reach {other.name}", output)
    assert "Traceback" not in output


def test_one_gpu_for_two_workers_is_left_with_a_word(cluster: Cluster) -> None:
    """Ray counts a GPU that isn't there; training on the CPUs doesn't touch it."""
    cluster.add_worker(gpus=1)
    cluster.wait_for_nodes(1 + len(cluster.workers))
    done = cluster.user(f"{TRAIN} --workers 2 --epochs 2 --model gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 GPU for 2 workers: training on CPUs" in done.stdout + done.stderr
