"""Starting a group on Ray Train: which processes it takes, and what they load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster.worker_count import WorkerGroup
from pipelines.cluster.workers import run_group
from pipelines.interfaces import Emit, NullEmit, World

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def look(payload: Any, world: World, emit: Emit) -> dict[str, Any]:
    """The processes of this cluster, by Ray's title, with whether torch is loaded, and the process
    group."""
    import psutil
    import torch

    loaded = {}
    for process in psutil.process_iter():
        try:
            title = " ".join(process.cmdline()).strip()
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except (psutil.Error, OSError):  # it has ended
            continue
        if title.startswith("ray::"):
            loaded[title.partition(".")[0]] = "libtorch" in maps
    distributed = torch.distributed
    return {
        "loaded": loaded,
        "group": (distributed.get_rank(), distributed.get_world_size(), distributed.get_backend()),
        "payload": payload,
    }


def test_only_the_workers_load_torch(tmp_path: Path) -> None:
    group = WorkerGroup(2, max_failures=0)
    seen = run_group(look, {"n": 3}, group, name="look", storage=tmp_path, emit=NullEmit())
    assert seen["group"] == (0, 2, "gloo")
    assert seen["payload"] == {"n": 3}
    loaded = seen["loaded"]
    assert loaded["ray::RayTrainWorker"], "the control: a worker has it"
    assert not loaded["ray::TrainController"]
    assert "ray::DatasetManager" not in loaded
