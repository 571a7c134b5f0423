"""ROOM: torch.distributed, where the workers of a group find each other: torch's TCPStore.

In: a worker's rank, and the address of the first worker. Out: a process group whose store listens
on that address alone. Must not know what the workers do.

By itself torch listens on all addresses of the machine, without a password: a program that reaches
the port reads and writes the keys with which the workers connect. With this store, no other machine
reaches a group on one machine, whose address is a loopback one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

SCHEME = "tessera"


def start_process_group(backend: str, rank: int, size: int) -> None:
    """Runs in a worker, after rank 0 has chosen MASTER_ADDR and MASTER_PORT for all of them."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group
    from torch.distributed.rendezvous import register_rendezvous_handler

    with suppress(RuntimeError):  # a worker that is kept has it already
        register_rendezvous_handler(SCHEME, _rendezvous)  # type: ignore[no-untyped-call]
    _set_torch_distributed_env_vars()
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    where = f"[{host}]" if ":" in host else host
    _setup_torch_process_group(backend, rank, size, f"{SCHEME}://{where}:{port}")


def end_process_group(size: int) -> None:
    """Runs in a worker, when its group ends."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=size > 1)


def set_meeting_place(host: str, port: int) -> None:
    """Runs in a worker: where rank 0 is going to open the store."""
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))


def _rendezvous(
    url: str, timeout: timedelta = timedelta(minutes=5), **options: Any
) -> Iterator[tuple[Any, int, int]]:
    """Called by torch with the rank and the size in the query; yields the store."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    rank, size = int(query["rank"][0]), int(query["world_size"][0])
    assert parts.hostname
    assert parts.port
    yield open_store(parts.hostname, parts.port, rank, size, timeout), rank, size
    raise RuntimeError("torch can't form this group a second time")


def open_store(host: str, port: int, rank: int, size: int, timeout: timedelta) -> Any:
    """The store of a group, whose server rank 0 runs, on this address alone."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if rank:
        return TCPStore(host, port, size, is_master=False, timeout=timeout)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=1024)
    return TCPStore(
        host,
        port,
        size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
