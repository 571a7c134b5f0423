"""Free places for workers on a real Ray, of which another job holds some."""

from __future__ import annotations

import threading

import pytest

from models.core.errors import TesseraError
from pipelines.cluster import worker_count
from pipelines.cluster.connection import cluster_resources, draining_nodes
from pipelines.cluster.worker_count import Places, WorkerGroup, count_places

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def group(workers: int, most: int) -> WorkerGroup:
    return WorkerGroup(workers, gpus=0, max_workers=most)


def test_an_elastic_group_gets_what_other_jobs_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_count, "SETTLE_SECONDS", 1.0)
    said: list[str] = []
    assert cluster_resources().cpus == 4
    assert draining_nodes() == {}
    assert count_places(group(1, 4), said.append) == 4
    with Places(group(1, 4), gpus=0) as other_job:
        other_job.request(3)
        while other_job.ready() < 3:
            pass
        assert count_places(group(1, 4), said.append) == 1
        assert said == []
        release = threading.Timer(3.0, other_job.release)
        release.start()
        assert count_places(group(2, 4), said.append) == 4
        release.join()
    assert said == ["waiting for 2 workers with 1 CPU each; the cluster has free places for 1 now"]


def test_too_few_free_places_are_refused_with_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_count, "BUSY_SECONDS", 2.0)
    with pytest.raises(TesseraError, match=r"5 to 9 workers don't fit.*free places for 4"):
        count_places(group(5, 9), print)
