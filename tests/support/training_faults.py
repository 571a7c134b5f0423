"""Trainings on a cluster in which something dies at a random time, and what is left of them.

In: a `Cluster` without a shared folder, whose runs are in its S3 server. Out: an `Outcome` of each
training. The command of a training is repeated until it succeeds, as a job with retries does.
"""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cluster_lab import BUCKET, DATA, RAY_PORT, Cluster
from lab import Machine

WORKERS = 2
SPARE_WORKERS = 1
MOST_ATTEMPTS = 4
ATTEMPT_SECONDS = 600
"""An attempt that takes longer hangs: an undisturbed one takes about a minute."""
AWAY_SECONDS = {"MLflow": 30, "the S3 server": 60}
"""How long a service that is killed stays away."""
MOST_REPEATED = 2
"""The epoch whose checkpoint was on its way to the store, and the next one, which is reported
before its own checkpoint waits for that upload. Here an upload takes about as long as an epoch."""
ENDS_COMMAND = ("the head", "the driver's machine")
"""What ends the command of the training as well, which is then repeated."""

RESUMED = "resumed from step-"
"""What a training says when it goes on from a checkpoint."""
_EPOCH = re.compile(r"^\W*epoch (\d+)/\d+", re.MULTILINE)
_DIGEST = f"""
import boto3, hashlib
client = boto3.client("s3")
listing = client.get_paginator("list_objects_v2")
pages = listing.paginate(Bucket={BUCKET!r}, Prefix="storage/runs/%s/")
keys = [each["Key"] for page in pages for each in page.get("Contents", [])]
last = max(key for key in keys if "/checkpoints/" in key and key.endswith("/manifest.json"))
weights = last.replace("manifest.json", "weights.safetensors")
print(hashlib.sha256(client.get_object(Bucket={BUCKET!r}, Key=weights)["Body"].read()).hexdigest())
"""


@dataclass
class Outcome:
    """How a training ended.

    Args:
        name: Of the run.
        victim: What was killed; empty if nothing was.
        epoch: The last epoch that was reported before.
        statuses: Exit status of each attempt; None of one that hung.
        repeated_epochs: Epochs that were reported and had to be trained again.
        status: Of the run in MLflow; empty if there isn't exactly one.
        points: The epochs of its metric, in order.
        weights: SHA-256 of the last checkpoint's weights.
        seconds: From the first attempt's start to the last one's end.
    """

    name: str
    victim: str
    epoch: int = 0
    statuses: list[int | None] = field(default_factory=list)
    repeated_epochs: int = 0
    status: str = ""
    points: list[int] = field(default_factory=list)
    weights: str = ""
    seconds: float = 0.0

    def faults(self, epochs: int, weights: str) -> list[str]:
        """What is wrong with it, compared with an undisturbed training that ended with these
        weights."""
        expected = {
            "hung": None not in self.statuses,
            "did not succeed": self.statuses[-1:] == [0],
            "not one finished run": self.status == "FINISHED",
            "points lost or doubled": self.points == list(range(1, epochs + 1)),
            "other weights": self.weights == weights,
            "more lost than was not yet in the store": self.repeated_epochs <= MOST_REPEATED,
        }
        return [fault for fault, good in expected.items() if not good]


class Trainings:
    """Trainings of one kind on a cluster, one after the other."""

    def __init__(self, cluster: Cluster, *, epochs: int, say: Callable[[str], None]) -> None:
        self._cluster, self._epochs, self._say = cluster, epochs, say
        cluster.start_driver()
        cluster.wait_for_nodes(2 + len(cluster.workers))

    def run(self, name: str, victim: str = "", chance: random.Random | None = None) -> Outcome:
        """Trains; with a victim, kills it after a random epoch and repairs the cluster."""
        outcome = Outcome(name, victim)
        began = time.monotonic()
        process, log = self._start(name, 1)
        if victim:
            assert chance
            outcome.epoch = chance.randrange(2, self._epochs * 3 // 4)
            self._cluster.wait_for_log(log, f"epoch {outcome.epoch}/", timeout_seconds=400)
            time.sleep(chance.uniform(0, 1))
            outcome.epoch = self._reported(log)[-1]
            self._say(f"{name}: killing {victim} after epoch {outcome.epoch}")
            self._kill(victim, name)
        # The repair is not in the thread: what a thread has started ends with it.
        with ThreadPoolExecutor(1) as threads:
            end = threads.submit(self._end, process)
            if victim and victim not in ENDS_COMMAND:
                self._repair(victim)
            outcome.statuses.append(end.result())
        if victim in ENDS_COMMAND:
            self._repair(victim)
        while outcome.statuses[-1] != 0 and len(outcome.statuses) < MOST_ATTEMPTS:
            process, _ = self._start(name, len(outcome.statuses) + 1)
            outcome.statuses.append(self._end(process))
        outcome.seconds = round(time.monotonic() - began, 1)
        self._judge(outcome)
        return outcome

    def _reported(self, log: str) -> list[int]:
        return list(map(int, _EPOCH.findall(self._cluster.lab.log(log))))

    def _start(self, name: str, attempt: int) -> tuple[subprocess.Popen[bytes], str]:
        assert self._cluster.driver
        log = f"{name}.{attempt}.log"
        command = (
            f"tessera train cnn --data {DATA} --workers {WORKERS} --epochs {self._epochs}"
            f" --run {name} --model faults"
        )
        address = {"RAY_ADDRESS": f"{self._cluster.head.address}:{RAY_PORT}"}
        return self._cluster.driver.start(command, address, log=log), log

    def _end(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit status of an attempt, None if it hung."""
        try:
            return process.wait(ATTEMPT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return None

    # ── faults ────────────────────────────────────────────────────────────────────────────────

    def _kill(self, victim: str, name: str) -> None:
        cluster = self._cluster
        if victim == "the head":
            cluster.head.kill()
        elif victim == "the driver's machine":
            assert cluster.driver
            cluster.driver.kill()
        elif victim == "MLflow":
            cluster.kill_mlflow()
        elif victim == "the S3 server":
            cluster.kill_store()
        else:
            cluster.kill(self._machine(name, leads=victim == "rank 0's machine"))

    def _repair(self, victim: str) -> None:
        """Brings back what an operator, or an autoscaler, would."""
        cluster, workers = self._cluster, WORKERS + SPARE_WORKERS
        time.sleep(AWAY_SECONDS.get(victim, 0))
        if victim == "MLflow":
            cluster.start_mlflow()
        elif victim == "the S3 server":
            cluster.restart_store()
        elif victim not in ENDS_COMMAND:
            cluster.add_worker()
        else:
            if victim == "the head":
                cluster.replace_head(workers=workers)
            cluster.start_driver()
            cluster.wait_for_nodes(2 + workers)

    def _machine(self, name: str, *, leads: bool) -> Machine:
        """A machine of the training: the one with rank 0, or another one."""
        busy = self._cluster.training_machines()
        folder = f"/srv/tessera/runs/{name}/checkpoints"
        leading = [machine for machine in busy if any(machine.path(folder).glob("step-*"))]
        return next(machine for machine in busy if (machine in leading) == leads)

    # ── what is left ──────────────────────────────────────────────────────────────────────────

    def _judge(self, outcome: Outcome) -> None:
        trained: list[str] = []
        for attempt in range(1, len(outcome.statuses) + 1):
            text = self._cluster.lab.log(f"{outcome.name}.{attempt}.log")
            if attempt > 1:  # events that may not have reached MLflow are told again before that
                text = text.partition(RESUMED)[2]
            trained += _EPOCH.findall(text)
        outcome.repeated_epochs = len(trained) - len(set(trained))
        runs = [run for run in self._cluster.runs("faults") if run.name == outcome.name]
        if len(runs) == 1:
            outcome.status, outcome.points = runs[0].status, runs[0].points
        if outcome.statuses[-1] == 0:
            outcome.weights = self._cluster.python(_DIGEST % outcome.name)


VICTIMS = (
    "rank 0's machine",
    "another machine",
    "the head",
    "the driver's machine",
    "MLflow",
    "the S3 server",
)
