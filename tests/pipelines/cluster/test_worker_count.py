"""How many workers a group gets on which cluster, what is said, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from models.core.errors import TesseraError
from pipelines.cluster import worker_count
from pipelines.cluster.connection import Resources
from pipelines.cluster.worker_count import WorkerGroup, check_fits, gpu_notice, wait_until_fits


@pytest.mark.parametrize(
    ("group", "gpus", "each", "notice"),
    [
        (WorkerGroup(2), 0, 0, None),
        (WorkerGroup(2), 1, 0, "1 GPU for 2 workers: training on CPUs; --workers 1 uses the GPU"),
        (WorkerGroup(2), 2, 1, None),
        (WorkerGroup(2), 8, 1, "using 2 of 8 GPUs; --workers 8 uses all"),
        (WorkerGroup(2, gpus=0), 8, 0, None),
        (
            WorkerGroup(2, max_workers=8),
            3,
            1,
            "3 GPUs for 2 to 8 workers: starting with 3, and growing with the cluster",
        ),
        (
            WorkerGroup(4, max_workers=8),
            3,
            0,
            "3 GPUs for 4 to 8 workers: training on CPUs; --workers 3 uses the GPUs",
        ),
    ],
)
def test_gpus_are_used_if_there_is_one_for_each_worker_and_what_is_left_is_said(
    group: WorkerGroup, gpus: int, each: int, notice: str | None
) -> None:
    resources = Resources(cpus=16, gpus=gpus)
    assert check_fits(group, resources) == each
    assert gpu_notice(group, resources) == notice


def test_a_range_fits_if_its_smallest_number_does() -> None:
    assert check_fits(WorkerGroup(2, max_workers=64), Resources(cpus=2)) == 0
    with pytest.raises(TesseraError, match=r"3 workers with 1 CPU each.*there are 2 CPUs"):
        check_fits(WorkerGroup(3, max_workers=64), Resources(cpus=2))


def test_an_empty_cluster_is_no_reason_for_fewer_workers() -> None:
    with pytest.raises(TesseraError) as caught:
        check_fits(WorkerGroup(2), Resources(cpus=0))
    assert "--workers" not in caught.value.hint
    assert "--wait" in caught.value.hint


class Cluster:
    """A cluster whose machines come one after another, and a clock that only waiting moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpus_at: dict[float, int]) -> None:
        self.now, self.cpus_at = 0.0, cpus_at
        self.said: list[tuple[float, str]] = []
        monkeypatch.setattr(worker_count, "cluster_resources", self.resources)
        monkeypatch.setattr(worker_count, "Places", NoPlaces)
        monkeypatch.setattr(worker_count.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(worker_count.time, "sleep", self.sleep)

    def resources(self) -> Resources:
        return Resources(cpus=max(n for at, n in self.cpus_at.items() if at <= self.now))

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def say(self, text: str) -> None:
        self.said.append((self.now, text))


class NoPlaces:
    def __init__(self, group: WorkerGroup, *, gpus: int) -> None: ...
    def __enter__(self) -> NoPlaces:
        return self

    def __exit__(self, *error: Any) -> None: ...
    def request(self, count: int) -> None: ...


def test_machines_on_their_way_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, {0: 0, 40: 1, 70: 2})
    assert wait_until_fits(WorkerGroup(2, wait_seconds=600), cluster.say) == 0
    assert cluster.now == 70
    line = "waiting for 2 workers with 1 CPU each; the cluster has {} CPUs now"
    assert cluster.said == [(0, line.format(0)), (30, line.format(0)), (60, line.format(1))]


def test_what_never_fits_is_refused_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, {0: 1})
    with pytest.raises(TesseraError, match="there are 1 CPUs after 20 s"):
        wait_until_fits(WorkerGroup(2, wait_seconds=20), cluster.say)
    assert cluster.now == 20
    with pytest.raises(TesseraError, match="there are 1 CPUs"):
        wait_until_fits(WorkerGroup(2), cluster.say)
    assert cluster.now == 20, "without a wait it is refused at once"
