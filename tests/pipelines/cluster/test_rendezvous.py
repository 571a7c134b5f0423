"""The store with which workers find each other listens on one address."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import psutil
import pytest

from jobs.shared.local_services import free_port
from pipelines.cluster import rendezvous

SOON = timedelta(seconds=20)


def listening(port: int) -> set[str]:
    return {
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_the_store_listens_on_the_address_of_the_first_worker(address: str) -> None:
    port = free_port()
    server = rendezvous.open_store(address, port, 0, 2, SOON)
    try:
        assert listening(port) == {address}
        stores: list[Any] = []
        other = threading.Thread(
            target=lambda: stores.append(rendezvous.open_store(address, port, 1, 2, SOON))
        )
        other.start()
        other.join(20)
        server.set("key", "value")
        assert stores[0].get("key") == b"value"
    finally:
        del server


def test_the_control_listens_on_all_addresses() -> None:
    from torch.distributed import TCPStore

    port = free_port()
    store = TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
    assert listening(port) - {"127.0.0.1"}
    del store
