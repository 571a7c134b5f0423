"""Checks that jobs have everything they need, on this machine and on every machine of the cluster.

In: a `Context`. Out: `Finding`s, each with a hint. `machine_probe.py` collects the facts of one
machine; here they are compared and judged. Must not know how findings are shown.
"""

from __future__ import annotations

import base64
import email.utils
import importlib.metadata
import platform
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from models.core.errors import TesseraError, hide_passwords
from pipelines.cluster import connection, session
from pipelines.cluster.machines import Agents, Machine, NoAnswer, agents
from pipelines.workflows import machine_probe
from pipelines.workflows.context import Context
from pipelines.workflows.machine_probe import MachineFacts, Peer, PeerFacts, ProbeOptions

LIBRARIES = ("torch", "torchvision", "ray", "mlflow", "webdataset", "safetensors")
"""Libraries that all machines must have in the same versions."""
MACHINE_CHECKS = (
    *("versions", "gpu", "shared memory", "disk", "storage", "data", "mlflow", "network", "clock"),
)
"""The checks of each machine, in the order of the table. `data` only if a data set is named."""

FREE_DISK_WARN_BYTES, FREE_DISK_FAIL_BYTES = 10 * 2**30, 2**30
SHARED_MEMORY_WARN_BYTES = 2**30
CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 5.0, 300.0
"""Points are logged with times. Object stores refuse requests of another time, S3 after 900 s."""
MOST_PEERS = 32
"""Each machine connects to so many of the others: all pairs of a cluster of up to 65 machines."""
_COLLECT_PART, _VISIT_PART, _QUICK_PART = 0.45, 0.15, 0.05
"""Of the time limit: what the machines may take to collect facts, to visit each other, and for what
takes no time on a machine that lives. The rest is for Ray."""


@dataclass(frozen=True)
class Finding:
    """The outcome of a check. `state` is ok, warn or fail; `machine` is empty for this process's
    own environment and for the cluster as a whole."""

    check: str
    state: str
    detail: str
    hint: str = ""
    machine: str = ""


def has_failed(findings: Sequence[Finding]) -> bool:
    return any(finding.state == "fail" for finding in findings)


# ── this process ──────────────────────────────────────────────────────────────────────────────


def check_versions() -> Iterator[Finding]:
    """Checks Python and each library against the versions that the package allows."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    hint = "install again: `make install`, or `pip install -r requirements.lock`"
    python = SpecifierSet(importlib.metadata.metadata("tessera-train")["Requires-Python"])
    good = python.contains(platform.python_version())
    yield Finding(
        "python",
        "ok" if good else "fail",
        f"{platform.python_version()} (allowed: {python})",
        f"use a Python that is {python}",
    )
    declared = map(Requirement, importlib.metadata.requires("tessera-train") or [])
    requirements = {each.name: each for each in declared if each.marker is None}
    for name, version in machine_probe.versions(LIBRARIES).items():
        bounds = requirements[name].specifier
        good = bool(version) and bounds.contains(version, prereleases=True)
        found = version or "not installed"
        yield Finding(name, "ok" if good else "fail", f"{found} (allowed: {bounds})", hint)


def check_tracking(uri: str) -> Iterator[Finding]:
    """Checks that MLflow answers this machine, and its clock against ours."""
    if not uri.startswith(("http://", "https://")):
        yield Finding("mlflow store", "ok", f"{hide_passwords(uri)} (no server)")
        return
    problem, ahead_seconds = _ask_server(f"{uri.rstrip('/')}/health")
    hint = "start it (tessera up), correct MLFLOW_TRACKING_URI, or unset it for the embedded store"
    found = hide_passwords(f"{uri} {problem}".strip())
    yield Finding("mlflow store", "fail" if problem else "ok", found, hint)
    if not problem:
        yield judge_clock("mlflow's clock", ahead_seconds)


def _ask_server(url: str) -> tuple[str, float]:
    """What is wrong with a server, empty if it answers, and by how many seconds its clock is ahead
    of ours, to the second; 0 if it doesn't say."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    parts = urllib.parse.urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl())
    if user:
        login = base64.b64encode(urllib.parse.unquote(user).encode()).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {login}")
    try:
        with opener.open(request, timeout=3) as response:
            date = response.headers["Date"]
    except urllib.error.HTTPError as error:
        error.close()
        return f"returns status {error.code}", 0.0
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionRefusedError):
            return "nothing listens there", 0.0
        return ("no response in 3 s" if isinstance(reason, TimeoutError) else str(reason)), 0.0
    try:
        return "", email.utils.parsedate_to_datetime(date).timestamp() + 0.5 - time.time()
    except (TypeError, ValueError):
        return "", 0.0


def judge_clock(check: str, ahead_seconds: float, machine: str = "") -> Finding:
    off = abs(ahead_seconds)
    state = "ok" if off < CLOCK_WARN_SECONDS else "warn" if off < CLOCK_FAIL_SECONDS else "fail"
    return Finding(
        check,
        state,
        f"{ahead_seconds:+.1f} s",
        "synchronize all clocks with NTP: metrics are logged with times, and object stores refuse "
        "requests of another time",
        machine,
    )


def check_private(context: Context) -> Finding:
    """Checks that no other user of this machine reads a token or a password, or changes what is
    executed."""
    held = [context.home / name for name in ("ray-token", "services.json", "logs")]
    with suppress(RuntimeError):  # without a home there is no token in it
        held.append(session.token_file())
    searches = [file.parent for file in context.searches_dir.glob("*/search.json")]
    problems = [p for path in [*held, *searches] if (p := session.open_to_others(path))]
    return Finding(
        "private files",
        "fail" if problems else "ok",
        "; ".join(problems) or "closed to other users",
        "chmod 600 for a file and 700 for a folder; if a secret was readable, make a new one",
    )


# ── the cluster ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class MachineReport:
    """What is known about a machine. `facts`, `peers` and `ahead_seconds` are None as far as it
    gave no answer; `problem` then says why."""

    machine: Machine
    facts: MachineFacts | None
    peers: PeerFacts | None = None
    ahead_seconds: float | None = None
    problem: str = ""


def check_cluster(
    context: Context, *, data: str | None = None, timeout_seconds: float = 180
) -> list[Finding]:
    """Asks every machine of the cluster, or of a Ray that is started here for it.

    Blocks as long as Ray doesn't answer at all: call it in a process that you can end. Machines
    that don't answer are waited for so that all is done in about `timeout_seconds`.
    """
    from pipelines.workflows import services

    services.apply_settings(context)  # before Ray is imported
    with ExitStack() as stack:
        token = secrets.token_hex(6)
        started = stack.enter_context(agents(context.ray_address, machine_probe.MachineProbe))
        run, refusal = "", ""
        try:
            run = stack.enter_context(_probe_run(context, token))
        except TesseraError as error:
            refusal = str(error)
        options = ProbeOptions(context, LIBRARIES, _storage(context), data, run, token)
        reports = ask(started, options, timeout_seconds)
        folder = connection.open_session_folder()
    found = started.resources
    total = f"{len(started.machines)} machines, " if len(started.machines) > 1 else ""
    where = hide_passwords(context.ray_address or "a local Ray")
    summary = f"{where}: {total}{found.cpus:g} CPUs, {found.gpus:g} GPUs"
    exposed = Finding(
        "session folder",
        "warn",
        f"every user of this machine may write to {folder}, and so run code as its owner",
        "start Ray with --temp-dir below a folder that only you may enter (mode 700)",
    )
    found_here = [Finding("ray", "ok", summary), *([exposed] if folder else [])]
    return [*found_here, *judge(reports, options, refusal)]


def _storage(context: Context) -> str:
    return f"{context.remote_storage}/runs" if context.remote_storage else str(context.runs_dir)


def _probe_run(context: Context, token: str) -> AbstractContextManager[str]:
    from pipelines.tracking import mlflow_probe

    return mlflow_probe.probe_run(context.tracking_uri, f"tessera-doctor-{token}")


def ask(started: Agents, options: ProbeOptions, timeout_seconds: float) -> list[MachineReport]:
    """Asks all machines, at the same time, in rounds: about itself, the others, the time."""
    machines = {machine.id: machine for machine in started.machines}
    alive = {id: each for id, each in machines.items() if not each.lost}
    questions = {id: (id, each.address, each.gpus, options) for id, each in alive.items()}
    facts = started.call("collect", questions, timeout_seconds=timeout_seconds * _COLLECT_PART)
    answered = [id for id in alive if not isinstance(facts[id], NoAnswer)]
    peers = started.call(
        "visit",
        {
            id: ([_peer(machines[other], facts[other]) for other in others],)
            for id, others in _rings(answered).items()
        },
        timeout_seconds=timeout_seconds * _VISIT_PART,
    )
    quick = timeout_seconds * _QUICK_PART
    ahead = {id: _clock_difference(started, id, quick) for id in answered}
    started.call("clean", {id: (id,) for id in answered}, timeout_seconds=quick)
    return [
        MachineReport(
            machine,
            _answer(facts.get(id)),
            _answer(peers.get(id)),
            ahead.get(id),
            machine.lost or next(_reasons(facts.get(id), peers.get(id)), ""),
        )
        for id, machine in machines.items()
    ]


def _answer(given: object) -> Any:
    return None if isinstance(given, NoAnswer) else given


def _reasons(*answers: object) -> Iterator[str]:
    return (answer.reason for answer in answers if isinstance(answer, NoAnswer))


def _peer(machine: Machine, facts: MachineFacts) -> Peer:
    return Peer(
        machine.id, machine.name, machine.address, facts.port, "storage" not in facts.problems
    )


def _rings(ids: Sequence[str]) -> dict[str, list[str]]:
    """The machines that each one visits: those that follow it in a ring."""
    count = min(len(ids) - 1, MOST_PEERS)
    return {
        id: [ids[(at + step) % len(ids)] for step in range(1, count + 1)]
        for at, id in enumerate(ids)
    }


def _clock_difference(started: Agents, id: str, timeout_seconds: float) -> float | None:
    """By how many seconds a machine's clock is ahead of ours; None if it doesn't answer."""
    before = time.time()
    remote = started.call("clock", {id: ()}, timeout_seconds=timeout_seconds)[id]
    after = time.time()
    if isinstance(remote, NoAnswer):
        return None
    # The machine read its clock between these two: any time in this span counts as equal.
    return float(min(0.0, remote - before) + max(0.0, remote - after))


# ── findings ──────────────────────────────────────────────────────────────────────────────────


def judge(
    reports: Sequence[MachineReport], options: ProbeOptions, refusal: str = ""
) -> Iterator[Finding]:
    """Findings about each machine, from what all of them report. `refusal` is why MLflow has no run
    that they could write to."""
    here = {"python": platform.python_version(), **machine_probe.versions(options.libraries)}
    digests = Counter(r.facts.data_digest for r in reports if r.facts and r.facts.data_digest)
    common_digest = digests.most_common(1)[0][0] if digests else ""
    for report in reports:
        name, facts = report.machine.name, report.facts
        if report.problem:
            yield Finding(
                "ray",
                "warn" if report.machine.lost else "fail",
                report.problem,
                "Ray's logs are on that machine, in session_latest/logs of Ray's folder: see "
                "whether it runs, reaches the head, and has the same code",
                name,
            )
        if not facts:
            continue
        yield _judge_versions(name, facts.versions, here)
        yield _judge_gpus(report.machine, facts.gpus)
        yield _judge_shared_memory(name, facts.shared_memory_bytes)
        yield _judge_disk(name, facts)
        yield _judge_storage(report, options.storage)
        if options.data:
            yield _judge_data(name, facts, common_digest, options.data)
        yield _judge_mlflow(name, facts.problems.get("mlflow") or refusal)
        yield _judge_network(report)
        if report.ahead_seconds is not None:
            yield judge_clock("clock", report.ahead_seconds, name)


def _judge_versions(name: str, there: Mapping[str, str], here: Mapping[str, str]) -> Finding:
    different = [
        f"{library} {version or 'missing'} (here {here[library] or 'missing'})"
        for library, version in there.items()
        if version != here[library]
    ]
    return Finding(
        "versions",
        "fail" if different else "ok",
        ", ".join(different) or "as here",
        "install the same requirements.lock, under the same Python, on all machines",
        name,
    )


def _judge_gpus(machine: Machine, usable: Sequence[str]) -> Finding:
    counted = Counter(usable)
    detail = ", ".join(f"{n} x {gpu}" for gpu, n in counted.items()) or "none"
    if machine.gpus <= len(usable):
        left = f", of which Ray uses {machine.gpus:g}" if machine.gpus < len(usable) else ""
        return Finding("gpu", "ok", detail + left, machine=machine.name)
    return Finding(
        "gpu",
        "warn",
        f"Ray counts {machine.gpus:g}, torch can use {len(usable)}",
        "check the driver and torch's CUDA build, and --num-gpus of `ray start`",
        machine.name,
    )


def _judge_shared_memory(name: str, size_bytes: int | None) -> Finding:
    enough = size_bytes is None or size_bytes >= SHARED_MEMORY_WARN_BYTES
    return Finding(
        "shared memory",
        "ok" if enough else "warn",
        "none: Ray uses files" if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB",
        "give more, in a container with `--shm-size=2g`; otherwise Ray's objects go to slow files",
        name,
    )


def _judge_disk(name: str, facts: MachineFacts) -> Finding:
    hint = "remove old runs, or set TESSERA_HOME and TESSERA_CACHE to a larger disk"
    if problem := facts.problems.get("disk"):
        return Finding("disk", "fail", problem, hint, name)
    folder, free = min(facts.free_bytes.items(), key=lambda pair: pair[1])
    state = "fail" if free < FREE_DISK_FAIL_BYTES else "warn"
    if free >= FREE_DISK_WARN_BYTES:
        return Finding("disk", "ok", f"{free / 2**30:.0f} GiB free", machine=name)
    return Finding("disk", state, f"{free / 2**30:.1f} GiB free at {folder}", hint, name)


def _judge_storage(report: MachineReport, storage: str) -> Finding:
    assert report.facts
    name, problem = report.machine.name, report.facts.problems.get("storage", "")
    unseen = report.peers.unseen if report.peers else []
    if not problem and unseen:
        problem = f"sees no files of {_some(unseen)} in {storage}"
    return Finding(
        "storage",
        "fail" if problem else "ok",
        problem or "writes and reads",
        "keep runs where all machines see the same files: in a folder that they share under the "
        "same path, or in an object store (TESSERA_STORAGE=s3://BUCKET/FOLDER)",
        name,
    )


def _judge_data(name: str, facts: MachineFacts, common_digest: str, data: str) -> Finding:
    problem = facts.problems.get("data", "")
    if not problem and facts.data_digest != common_digest:
        problem = f"another data set than on the other machines is at {data}"
    return Finding(
        "data",
        "fail" if problem else "ok",
        problem or "readable",
        "every machine must see the data set under the same path or address",
        name,
    )


def _judge_mlflow(name: str, problem: str) -> Finding:
    return Finding(
        "mlflow",
        "fail" if problem else "ok",
        problem or "writes and reads",
        "MLFLOW_TRACKING_URI must be an address that this machine reaches, and "
        "MLFLOW_TRACKING_USERNAME and _PASSWORD those of a user who may write",
        name,
    )


def _judge_network(report: MachineReport) -> Finding:
    assert report.facts
    name, problem = report.machine.name, report.facts.problems.get("network", "")
    unreachable = report.peers.unreachable if report.peers else {}
    if not problem and unreachable:
        reason = next(iter(unreachable.values()))
        problem = f"can't reach {_some(list(unreachable))}: {reason}"
    return Finding(
        "network",
        "fail" if problem else "ok",
        problem or "reaches all",
        "all machines must reach each other on all ports: check routes, firewalls and cables",
        name,
    )


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + rest
