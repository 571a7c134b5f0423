"""The interface to the head, and what is said of machines that can't reach each other."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pipelines.cluster import network
from pipelines.cluster.network import Machine, describe_unreachable, pairs_to_try, this_machine

MACHINES = [Machine(f"m{i}", f"10.0.0.{i}", "eth1") for i in range(4)]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    network.stop_listening()


def test_the_interface_that_routes_to_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    host = socket.gethostname()
    assert this_machine("127.0.0.1:6379") == Machine(host, "127.0.0.1", "lo")
    for name, address in network.interface_addresses().items():
        assert this_machine(f"{address}:6379").interface == name
    assert this_machine("not-an-address:6379") == Machine(host), "no route, so gloo chooses"


def test_the_interface_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert this_machine("192.0.2.1:6379") == Machine(socket.gethostname(), "127.0.0.1", "lo")


def test_a_port_that_listens_is_reached_and_a_closed_one_is_not() -> None:
    port = network.listen("127.0.0.1")
    assert network.unreachable([("127.0.0.1", port)]) == []
    network.stop_listening()
    assert network.unreachable([("127.0.0.1", port)]) == ["127.0.0.1"]


def test_the_line_names_who_cannot_reach_whom() -> None:
    assert describe_unreachable(MACHINES, {0: [], 1: []}) == ""
    line = describe_unreachable(MACHINES, {0: [], 2: ["10.0.0.0", "10.0.0.3"]})
    assert line == ("m2 (10.0.0.2, eth1) can't reach m0 (10.0.0.0, eth1) and m3 (10.0.0.3, eth1)")
    everywhere = {i: ["10.0.0.0"] for i in range(4)}
    assert describe_unreachable(MACHINES, everywhere).endswith("; and 1 more")


def test_large_groups_try_a_few_connections_each() -> None:
    assert len(pairs_to_try(4)) == 4 * 3
    pairs = pairs_to_try(1000)
    assert len(pairs) < 2 * 1000
    assert {b for _, b in pairs} == set(range(1000)), "every machine is tried by another one"
