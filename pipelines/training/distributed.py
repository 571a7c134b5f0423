"""torch.distributed, as functions of a `World`. With a world of one, each returns its argument.

In: tensors, objects, modules and the `World`. Out: the same, agreed among the ranks. The process
group exists already: Ray Train or a test created it. Must not know what is trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.interfaces import World


def wrap(module: nn.Module, world: World) -> nn.Module:
    """The module under DistributedDataParallel. Buffers are not broadcast in each step, which would
    cost a collective call: each rank has its own statistics, and `average_buffers` merges them
    before they are used."""
    if world.size == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    from torch.nn.parallel import DistributedDataParallel

    known = inspect.signature(DistributedDataParallel).parameters
    # Renamed between torch 2.11 and 2.15.
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        module,
        device_ids=[torch.device(world.device)] if world.device != "cpu" else None,
        gradient_as_bucket_view=True,
        **{sync: False},  # type: ignore[arg-type]
    )


@contextmanager
def no_sync(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this block, gradients are not synchronised: for all but the last piece of a batch."""
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "no_sync"):
                stack.enter_context(module.no_sync())  # type: ignore[operator]
        yield


def all_sum(values: Tensor, world: World) -> Tensor:
    """Elementwise sum over the ranks, on every rank."""
    if world.size > 1:
        torch.distributed.all_reduce(values)  # collective
    return values


def average_buffers(module: nn.Module, world: World) -> None:
    """Makes the floating-point buffers (BatchNorm's statistics) the mean over the ranks."""
    if world.size == 1:
        return
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([b.detach().reshape(-1).double() for b in buffers])
    torch.distributed.all_reduce(flat)  # collective
    flat /= world.size
    means = torch.split(flat, [b.numel() for b in buffers])
    for buffer, mean in zip(buffers, means):
        buffer.copy_(mean.view_as(buffer))


def gather(value: Any, world: World) -> list[Any] | None:
    """Every rank's value, in rank order, on rank 0; None elsewhere. The value is pickled, which is
    safe between the processes of one training."""
    if world.size == 1:
        return [value]
    gathered: list[Any] | None = [None] * world.size if world.leads else None
    torch.distributed.gather_object(value, gathered)  # collective
    return gathered


def all_gather(value: Any, world: World) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    gathered: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(gathered, value)  # collective
    return gathered


def broadcast(value: Any, world: World) -> Any:
    """Rank 0's value, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)  # collective
    return box[0]
