"""The machines of a Ray cluster, and an agent on each of them that answers questions.

In: the class of the agent. Out: the answer of each machine to a call, or why it has none. Must not
know what an agent does.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipelines.cluster.connection import Resources, cluster_resources, connect, disconnect


@dataclass(frozen=True)
class Machine:
    """A node of the cluster. `id` is Ray's. `is_here` tells whether this process runs on it.
    `lost` is why Ray has given it up, empty if it is alive."""

    id: str
    name: str
    address: str
    cpus: float
    gpus: float
    is_here: bool
    lost: str = ""


@dataclass(frozen=True)
class NoAnswer:
    """What a machine has in place of an answer. `reason` continues a sentence about the machine."""

    reason: str


class Agents:
    """An agent on each machine that is alive."""

    def __init__(self, machines: list[Machine], resources: Resources, agent: type) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.machines, self.resources = machines, resources
        start = ray.remote(num_cpus=0, max_restarts=0)(agent)
        self._actors = {
            machine.id: start.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(machine.id, soft=False)
            ).remote()
            for machine in machines
            if not machine.lost
        }

    def call(
        self, method: str, arguments: Mapping[str, tuple[Any, ...]], *, timeout_seconds: float
    ) -> dict[str, Any]:
        """Calls a method of the agents on the machines with these ids, all at the same time.
        Returns the results by id, a `NoAnswer` for one that failed or took too long."""
        import ray

        calls = {
            id: getattr(self._actors[id], method).remote(*each) for id, each in arguments.items()
        }
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_seconds)
        return {id: _result(call, timeout_seconds) for id, call in calls.items()}

    def end(self) -> None:
        import ray

        for actor in self._actors.values():
            with contextlib.suppress(Exception):
                ray.kill(actor)


def _result(call: Any, timeout_seconds: float) -> Any:
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    try:
        return ray.get(call, timeout=0)
    except GetTimeoutError:
        return NoAnswer(f"gave no answer in {timeout_seconds:.0f} s")
    except RayTaskError as error:
        return NoAnswer(f"failed: {_last_line(str(error))}")
    except RayError as error:  # the process, or the machine, or the network to it
        return NoAnswer(f"runs no process for us: {_last_line(str(error))}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["?"]
    return lines[-1][:300]


@contextlib.contextmanager
def agents(address: str | None, agent: type) -> Iterator[Agents]:
    """Joins the cluster at `address`, or starts one here, and an agent on each of its machines.

    Blocks as long as the cluster doesn't answer: call it in a process that you can end.
    """
    connect(address)
    try:
        started = Agents(machines(), cluster_resources(), agent)
        try:
            yield started
        finally:
            started.end()
    finally:
        disconnect()


def machines() -> list[Machine]:
    """The machines of the cluster that this process is connected to, this one first, then by name.
    Names are unique. Those that left as expected are not among them."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    found = [
        Machine(
            id=node["NodeID"],
            name=node["NodeManagerHostname"] or node["NodeManagerAddress"],
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0),
            gpus=node["Resources"].get("GPU", 0),
            is_here=node["NodeID"] == here,
            lost="" if node["Alive"] else (node.get("DeathReasonMessage") or "it died"),
        )
        for node in ray.nodes()
        if node["Alive"] or _died_unexpectedly(node)
    ]
    names = Counter(machine.name for machine in found)
    named = [
        replace(machine, name=f"{machine.name}/{machine.id[:6]}")
        if names[machine.name] > 1
        else machine
        for machine in found
    ]
    return sorted(named, key=lambda machine: (not machine.is_here, machine.name))


def _died_unexpectedly(node: Mapping[str, Any]) -> bool:
    from ray.core.generated.common_pb2 import NodeDeathInfo

    return bool(node.get("DeathReason") == NodeDeathInfo.Reason.Value("UNEXPECTED_TERMINATION"))
