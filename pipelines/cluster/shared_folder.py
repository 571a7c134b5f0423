"""Whether the machines of a cluster share a folder.

In: a folder of this machine. Out: the machines that don't see the same files in it. Must not know
what the folder is for.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from models.core.errors import TesseraError

PROBE_SECONDS = 60.0
"""How long a machine may take to start a process that looks."""


@dataclass(frozen=True)
class UnsharedNode:
    """A machine that doesn't share a folder with this one, and why, as in "doesn't see it"."""

    name: str
    reason: str


def check_shared(folder: Path, *, cpus: int = 1) -> None:
    """Raises TesseraError if a machine that workers may run on doesn't share `folder` with this
    one. Asks only machines that have so many `cpus`."""
    apart = unshared_nodes(folder, cpus=cpus)
    if not apart:
        return
    named = ", ".join(node.name for node in apart[:3]) + (", …" if len(apart) > 3 else "")
    raise TesseraError(
        f"the machines of the cluster don't share {folder}, so what is trained would be lost: "
        f"{named} {apart[0].reason}",
        hint="keep runs in an object store: --storage s3://BUCKET/FOLDER, or TESSERA_STORAGE",
    )


def unshared_nodes(folder: Path, *, cpus: int = 1) -> list[UnsharedNode]:
    """The machines of the cluster that this process is connected to which don't share `folder`.

    A file is written here and read on each machine, and the other way round. A cluster of one
    machine isn't asked. `folder` is created if it doesn't exist.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != here
        and node["Resources"].get("CPU", 0) >= max(cpus, 1)
    ]
    if not nodes:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    probe = folder / f".probe-{token}"
    probe.write_text(token)
    try:
        return _ask(probe, token, nodes)
    finally:
        for file in folder.glob(f".probe-{token}*"):
            with suppress(OSError):
                file.unlink()


def _ask(probe: Path, token: str, nodes: list[dict[str, object]]) -> list[UnsharedNode]:
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(answer_probe)
    asked = {}
    for node in nodes:
        pinned = NodeAffinitySchedulingStrategy(str(node["NodeID"]), soft=False)
        reply = probe.with_name(f"{probe.name}-{node['NodeID']}")
        sent = task.options(scheduling_strategy=pinned).remote(str(probe), str(reply), token)
        asked[sent] = (str(node["NodeManagerHostname"] or node["NodeManagerAddress"]), reply)
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS)
    apart = []
    for sent in [*done, *late]:
        name, reply = asked[sent]
        try:
            reason = ray.get(sent, timeout=0)
        except (RayError, GetTimeoutError):
            ray.cancel(sent, force=True)
            reason = f"didn't answer within {PROBE_SECONDS:.0f} s"
        if not reason and not (reply.is_file() and reply.read_text() == token):
            reason = "writes to a folder that this machine doesn't see"
        if reason:
            apart.append(UnsharedNode(name, reason))
    return sorted(apart, key=lambda node: node.name)


def answer_probe(probe: str, reply: str, token: str) -> str:
    """Runs on each machine. Returns why the folder isn't shared, as far as this machine can tell;
    empty if it seems to be."""
    try:
        seen = Path(probe).read_text()
    except FileNotFoundError:
        return "doesn't see its files"
    except OSError as error:
        return f"can't read it: {error.strerror}"
    if seen != token:
        return "doesn't see its files"
    try:
        descriptor = os.open(reply, os.O_CREAT | os.O_WRONLY, 0o666)
        os.write(descriptor, token.encode())
        os.fsync(descriptor)
        os.close(descriptor)
    except OSError as error:
        return f"can't write to it: {error.strerror}"
    return ""
