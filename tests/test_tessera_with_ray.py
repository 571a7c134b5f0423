"""The Python API in a task of Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tessera
from pipelines.cluster import tasks

SMALL = {"train.epochs": 1, "workers.count": 0}


@pytest.mark.slow
def test_a_ray_task_can_train(digits: Path, ray_cluster: None, own_home: Path) -> None:
    """Where Ray runs already it is used, and is left running."""
    context = tessera.Context.from_environment({"TESSERA_HOME": str(own_home)})

    def train(shared: Any, settings: dict[str, Any]) -> str:  # sent by value: it has no module
        import tessera

        data, context = shared
        run = tessera.train(
            "cnn",
            data=data,
            variant="tiny",
            set=settings,
            model="from-a-task",
            progress=False,
            context=context,
        )
        return run.version.name

    ((_, name),) = tasks.map_tasks(train, (str(digits), context), [SMALL], workers=1)
    assert name == "from-a-task"
    assert len(tessera.load(name, context=context).classes) == 10
