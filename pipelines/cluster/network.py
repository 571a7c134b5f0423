"""The network between the workers of a group: the interface that they use, and who reaches whom.

In: the workers, before they connect to each other. Out: gloo and NCCL set to the interface that
routes to the cluster's head, or an error that names the machines that can't reach each other. Must
not know what the workers do.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from pipelines.cluster.group_control import note_termination

FORMING_SECONDS = 120.0
"""How long the workers may take to connect; torch's own limit of 1,800 s is that of a collective
call too."""
PROBE_SECONDS = 5.0
MOST_PROBED = 32
"""In a group on more machines, each one only tries to reach the first and the next one."""
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Machine:
    """A machine of the group, and where its workers are reached: an IPv4 address and its interface.
    Both are empty if they couldn't be found."""

    host: str
    address: str = ""
    interface: str = ""

    def __str__(self) -> str:
        return f"{self.host} ({self.address}, {self.interface})"


class GroupNotFormedError(RuntimeError):
    """The workers of a group can't connect to each other."""


def interface_addresses() -> dict[str, str]:
    """Interface -> its IPv4 address, of those that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
            except OSError:  # it has no address
                continue
    return found


def this_machine(head: str) -> Machine:
    """This machine, by the interface that routes to the address of the cluster's head, or the one
    that the user has set for gloo. Sends nothing and resolves no name."""
    host, addresses = socket.gethostname(), interface_addresses()
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if chosen:
        return Machine(host, addresses.get(chosen, ""), chosen)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            numeric = str(IPv4Address(head.rpartition(":")[0]))
            probe.connect((numeric, 9))  # chooses a route; no datagram is sent
            address = probe.getsockname()[0]
        except (OSError, ValueError):
            return Machine(host)
    name = next((name for name, own in addresses.items() if own == address), "")
    return Machine(host, address, name)


def prepare_worker() -> Machine:
    """Runs in a worker before it connects to the others. Without an interface gloo resolves the
    name of its machine, which many machines map to a loopback address, and some to nothing."""
    import ray

    note_termination()
    machine = this_machine(ray.get_runtime_context().gcs_address)
    if machine.interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", machine.interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={machine.interface}")
    return machine


_listening: dict[str, socket.socket] = {}


def listen(address: str) -> int:
    """Opens a port for the others to try. `stop_listening` closes it."""
    _listening[address] = socket.create_server((address, 0), backlog=128)
    return int(_listening[address].getsockname()[1])


def stop_listening() -> None:
    for server in _listening.values():
        server.close()
    _listening.clear()


def unreachable(targets: Sequence[tuple[str, int]]) -> list[str]:
    """Of (address, port) pairs, the addresses to which no connection can be made."""

    def connects(target: tuple[str, int]) -> bool:
        try:
            socket.create_connection(target, timeout=PROBE_SECONDS).close()
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(MOST_PROBED) as pool:
        reached = list(pool.map(connects, targets))
    return [address for (address, _), is_reached in zip(targets, reached) if not is_reached]


def pairs_to_try(machines: int) -> list[tuple[int, int]]:
    """Who tries to reach whom: everybody everybody, in large groups only the first and the next."""
    each = range(machines)
    if machines <= MOST_PROBED:
        return [(a, b) for a in each for b in each if a != b]
    return sorted({(a, b) for a in each for b in (0, (a + 1) % machines) if a != b})


def describe_unreachable(machines: Sequence[Machine], failed: Mapping[int, Sequence[str]]) -> str:
    """One line for the machines (by index) that can't reach some addresses; empty if all can."""
    by_address = {machine.address: machine for machine in machines}
    lines = [
        f"{machines[index]} can't reach {' and '.join(str(by_address[a]) for a in addresses)}"
        for index, addresses in sorted(failed.items())
        if addresses
    ]
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def probe(group: Any, ranks: Sequence[int], machines: Sequence[Machine]) -> str:
    """Lets one worker of each machine (`ranks`) connect to the others. Returns a line about those
    that can't be reached; empty if all can."""
    import ray

    def on_each(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        calls = [group.execute_single_async(r, call, *a) for r, a in zip(ranks, arguments)]
        return list(ray.get(calls, timeout=FORMING_SECONDS))

    ports = on_each(listen, [(machine.address,) for machine in machines])
    targets: list[list[tuple[str, int]]] = [[] for _ in machines]
    for source, target in pairs_to_try(len(machines)):
        targets[source].append((machines[target].address, ports[target]))
    failed = on_each(unreachable, [(each,) for each in targets])
    on_each(stop_listening, [()] * len(machines))
    return describe_unreachable(machines, dict(enumerate(failed)))


def form(group: Any, connect: Callable[[], None]) -> None:
    """Prepares the workers of a Ray Train group and connects them with `connect`.

    Raises GroupNotFormedError that names the machines which can't reach each other.
    """
    of_rank: list[Machine] = group.execute(prepare_worker)
    first_ranks = {m.address: rank for rank, m in reversed(list(enumerate(of_rank))) if m.address}
    ranks = sorted(first_ranks.values())
    machines = [of_rank[rank] for rank in ranks]
    if len(machines) > 1 and (line := probe(group, ranks, machines)):
        raise GroupNotFormedError(f"the workers can't connect: {line}")
    errors: list[BaseException] = []

    def run() -> None:
        try:
            connect()
        except BaseException as error:
            errors.append(error)

    connecting = threading.Thread(target=run, name="connect-workers", daemon=True)
    connecting.start()
    connecting.join(FORMING_SECONDS)
    if errors:
        raise errors[0]
    if connecting.is_alive():
        places = ", ".join(map(str, machines))
        raise GroupNotFormedError(
            f"the workers did not connect within {FORMING_SECONDS:.0f} s, on {places}"
        )
