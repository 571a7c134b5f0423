"""How Ray Train starts a group of workers, in two thirds of the time that it takes by itself.

In: what each worker runs. Out: a Ray Train trainer whose workers are connected by
torch.distributed. Must not know what they run.

For each group Ray Train starts a process that controls it. With its `TorchTrainer` this process
loads torch, and another one is started for Ray Data, which isn't used here. Together they take four
seconds of the start of a group on two cores. Here only the workers load torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from pipelines.cluster import network, rendezvous

END_SECONDS = 30.0
"""How long the workers may take to leave their process group."""


def make_trainer(loop: Callable[[Any], Any], config: dict[str, Any], **options: Any) -> Any:
    """A trainer that runs `loop(config)` in each worker. `options` are those of Ray's trainers,
    such as `scaling_config`.

    The process that controls the group unpickles `config` too: what needs torch has to be in it as
    bytes.
    """
    backend = _backend_config()()
    return _trainer()(loop, train_loop_config=config, backend_config=backend, **options)


@cache
def _trainer() -> type[Any]:
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Trainer(DataParallelTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            """All but the one that starts a process for Ray Data."""
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if not isinstance(each, DatasetsCallback)]

    return Trainer


@cache
def _backend_config() -> type[Any]:
    from ray.train import backend

    class Backend(backend.Backend):  # type: ignore[misc]
        """Connects the workers. Runs in the process that controls them."""

        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            network.form(worker_group, lambda: _connect(worker_group))

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            _disconnect(worker_group)

    class Config(backend.BackendConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[Any]:
            return Backend

        @property
        def train_func_context(self) -> Any:
            """A worker runs its function in Ray's context, which sets the device of torch."""
            from ray.train.torch import TorchConfig

            return TorchConfig().train_func_context

    return Config


def _connect(group: Any) -> None:
    import ray
    from ray.train._internal.utils import get_address_and_port

    kind = "nccl" if group.get_resources_per_worker().get("GPU", 0) else "gloo"
    group.execute(rendezvous.set_meeting_place, *group.execute_single(0, get_address_and_port))
    size, start = len(group), rendezvous.start_process_group
    ray.get([group.execute_single_async(rank, start, kind, rank, size) for rank in range(size)])


def _disconnect(group: Any) -> None:
    """Best effort: Ray Train ends the processes of the workers next."""
    import ray
    from ray.exceptions import GetTimeoutError

    calls = group.execute_async(rendezvous.end_process_group, len(group))
    try:
        ray.get(calls, timeout=END_SECONDS)
    except GetTimeoutError:
        return
