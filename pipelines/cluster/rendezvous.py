"""ROOM: torch.distributed, where the workers of a group find each other: torch's TCPStore.

In: the workers of a Ray Train group. Out: a process group whose store listens on the address of the
first worker alone. Must not know what the workers do.

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


class GroupWithStore:
    """A Ray Train worker group whose workers start torch.distributed with our store. Everything
    else is passed on."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def __len__(self) -> int:
        return len(self._group)

    def execute_single_async(self, index: int, call: Any, *arguments: Any, **named: Any) -> Any:
        from ray.train.torch.config import _setup_torch_process_group

        if call is _setup_torch_process_group:
            call = start_process_group
        return self._group.execute_single_async(index, call, *arguments, **named)


def start_process_group(**options: Any) -> None:
    """Runs in a worker, in place of Ray's own function, after Ray has set MASTER_ADDR and
    MASTER_PORT."""
    from ray.train.torch.config import _setup_torch_process_group
    from torch.distributed.rendezvous import register_rendezvous_handler

    with suppress(RuntimeError):  # a worker that is kept has it already
        register_rendezvous_handler(SCHEME, _rendezvous)  # type: ignore[no-untyped-call]
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    where = f"[{host}]" if ":" in host else host
    _setup_torch_process_group(**{**options, "init_method": f"{SCHEME}://{where}:{port}"})


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
