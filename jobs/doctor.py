"""`tessera doctor`: checks, on this machine and on a worker, that jobs have everything they need.

In: the environment. Out: a line for each check, `ok`, `warn` or `fail`, with a hint. The time is
limited: what may hang runs in a subprocess, which is ended at the limit.
"""

from __future__ import annotations

import email.utils
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import click

from jobs.cli import run
from jobs.shared import local_services
from jobs.shared.terminal import show_json
from pipelines.workflows.context import Context

LIBRARIES = ("torch", "torchvision", "ray", "mlflow", "webdataset", "safetensors")
"""Libraries that a worker must have in the same versions as this machine."""

FREE_DISK_WARN_BYTES, FREE_DISK_FAIL_BYTES = 10 * 2**30, 2**30
SHARED_MEMORY_WARN_BYTES = 2**30
CLOCK_WARN_SECONDS = 5.0
_REPORT = "doctor's report: "


@dataclass(frozen=True)
class Finding:
    check: str
    state: str
    detail: str
    hint: str = ""


GROUP = "services"


@click.command(short_help="Check libraries, GPU, Ray, MLflow, storage, disk and clock.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(1),
    default=120,
    show_default=True,
    help="Seconds that Ray and its worker may take.",
)
@click.option("--probe", hidden=True, help="What the subprocess checks on a worker.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(as_json: bool, timeout_seconds: float, probe: str | None, verbose: bool) -> int:
    """Check versions, GPU, Ray, MLflow, storage, disk, shared memory and clock.

    Ray, MLflow and the storage are also checked from a worker: on the cluster at RAY_ADDRESS, on
    what `tessera up` started, or on a Ray that is started for the check. For a remote cluster use
    `tessera submit doctor`. The exit status is 1 if a check fails.
    """
    del verbose
    if probe is not None:
        click.echo(_REPORT + json.dumps(probe_worker(json.loads(probe))))
        return 0
    use_local_services()
    context = Context.from_environment()
    findings = []
    for finding in check_all(context, timeout_seconds):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.state:<5} {finding.check:<15} {finding.detail}")
            if finding.hint and finding.state != "ok":
                click.echo(f"{'':<21} → {finding.hint}")
    if as_json:
        show_json([asdict(finding) for finding in findings])
    return int(any(finding.state == "fail" for finding in findings))


class WorkerProbe(TypedDict):
    """What to check on a worker; passed as JSON on the command line of the subprocess.

    `ours` is a file that contains `mark`; the worker writes `mark` to `theirs`.
    """

    address: str | None
    tracking: str
    libraries: Sequence[str]
    ours: str
    theirs: str
    mark: str


class WorkerFacts(TypedDict):
    """The results of the checks on a worker. The version of a missing library is an empty text, and
    so is a problem that doesn't exist; `time` is the worker's clock, in seconds since 1970."""

    versions: dict[str, str]
    devices: list[str]
    mlflow_problem: str
    storage_problem: str
    time: float


class WorkerReport(WorkerFacts):
    """The results, and what the subprocess adds: the cluster's resources, and by how many seconds
    the worker's clock is ahead of ours."""

    cpus: float
    gpus: float
    ahead_seconds: float


def use_local_services() -> None:
    """Uses what `tessera up` started, unless the environment names another cluster."""
    up = local_services.load(Context.from_environment().home)
    if up and "RAY_ADDRESS" not in os.environ and all(map(local_services.is_alive, up.services)):
        for name, value in up.environment.items():
            os.environ.setdefault(name, value)


def check_all(context: Context, timeout_seconds: float) -> Iterator[Finding]:
    yield from check_versions()
    yield check_disk(context.home)
    yield check_shared_memory()
    yield from check_tracking(context.tracking_uri)
    yield from check_worker(context, timeout_seconds)


# ── this machine ──────────────────────────────────────────────────────────────────────────────


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
    for name in LIBRARIES:
        bounds = requirements[name].specifier
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "fail", f"not installed (allowed: {bounds})", hint)
            continue
        good = bounds.contains(version, prereleases=True)
        yield Finding(name, "ok" if good else "fail", f"{version} (allowed: {bounds})", hint)


def check_disk(folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    state = "fail" if free < FREE_DISK_FAIL_BYTES else "warn"
    return Finding(
        "disk",
        "ok" if free >= FREE_DISK_WARN_BYTES else state,
        f"{free / 2**30:.1f} GiB free at {folder}",
        "remove old runs, or set TESSERA_HOME to a larger disk",
    )


def check_shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("shared memory", "ok", "this system has no /dev/shm; Ray uses files")
    total = shutil.disk_usage(path).total
    return Finding(
        "shared memory",
        "ok" if total >= SHARED_MEMORY_WARN_BYTES else "warn",
        f"{total / 2**30:.2f} GiB at {path}",
        "give more, in a container with `--shm-size=2g`; otherwise Ray's objects go to slow files",
    )


def check_tracking(uri: str) -> Iterator[Finding]:
    """Checks MLflow from this machine, and its clock against ours."""
    if not uri.startswith(("http://", "https://")):
        yield Finding("mlflow store", "ok", f"{uri} (embedded)")
        return
    reason = local_services.probe_url(f"{uri.rstrip('/')}/health")
    hint = "start it (tessera up), correct MLFLOW_TRACKING_URI, or unset it for the embedded store"
    yield Finding("mlflow store", "fail" if reason else "ok", f"{uri} {reason}".strip(), hint)
    if not reason:
        yield check_clock("mlflow's clock", server_time(f"{uri.rstrip('/')}/health") - time.time())


def server_time(url: str) -> float:
    """Seconds since 1970 by a server's Date header, to the second; ours if it sends none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=3) as response:
            return email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp() + 0.5
    except (OSError, TypeError, ValueError):
        return time.time()


def check_clock(check: str, ahead_seconds: float) -> Finding:
    return Finding(
        check,
        "ok" if abs(ahead_seconds) < CLOCK_WARN_SECONDS else "warn",
        f"{ahead_seconds:+.1f} s from ours",
        "synchronize both clocks with NTP: metrics are logged with timestamps",
    )


# ── a worker ──────────────────────────────────────────────────────────────────────────────────


def check_worker(context: Context, timeout_seconds: float) -> Iterator[Finding]:
    """Checks Ray, and with it the machine of one worker."""
    name = context.ray_address or "a local Ray"
    folder = context.runs_dir
    mark = secrets.token_hex(8)
    ours, theirs = folder / f".doctor-{mark}", folder / f".doctor-{mark}-worker"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours.write_text(mark)
    except OSError as error:
        hint = "set TESSERA_HOME to a folder that you may write"
        yield Finding("storage", "fail", f"{folder}: {error.strerror}", hint)
    probe: WorkerProbe = {
        "address": context.ray_address,
        "tracking": context.tracking_uri,
        "libraries": LIBRARIES,
        "ours": str(ours),
        "theirs": str(theirs),
        "mark": mark,
    }
    try:
        report, problem = probe_in_subprocess(probe, timeout_seconds)
        seen = theirs.exists()
    finally:
        ours.unlink(missing_ok=True)
        theirs.unlink(missing_ok=True)
    if report is None:
        hint = "see `tessera status`; unset RAY_ADDRESS to use an embedded Ray"
        yield Finding("ray", "fail", f"{name}: {problem}", hint)
        return
    yield Finding("ray", "ok", f"{name}: {report['cpus']:g} CPUs, {report['gpus']:g} GPUs")
    yield from judge(report, seen, folder)


def judge(report: WorkerReport, seen: bool, runs_dir: Path) -> Iterator[Finding]:
    """Findings from a worker's report. `seen`: whether the file that it wrote is visible here."""
    different = [
        f"{name} {version or 'missing'} (here {_version(name) or 'missing'})"
        for name, version in report["versions"].items()
        if version != _version(name)
    ]
    yield Finding(
        "worker's versions",
        "fail" if different else "ok",
        ", ".join(different) or "the same as here",
        "install the same requirements.lock on all machines of the cluster",
    )
    gpu = ", ".join(report["devices"])
    yield Finding(
        "gpu",
        "warn" if report["gpus"] and not gpu else "ok",
        gpu or "none: training runs on the CPU",
        "Ray counts GPUs that torch can't use there: check the driver, and torch's CUDA build",
    )
    mlflow = report["mlflow_problem"]
    yield Finding(
        "worker to mlflow",
        "fail" if mlflow else "ok",
        mlflow or "reaches it",
        "MLFLOW_TRACKING_URI must be an address that the worker's machine can reach",
    )
    storage = report["storage_problem"] or ("" if seen else "its file is not visible here")
    yield Finding(
        "worker's storage",
        "fail" if storage else "ok",
        storage or f"writes {runs_dir}, visible here",
        "TESSERA_HOME must be a folder that all machines share, under the same path",
    )
    yield check_clock("worker's clock", report["ahead_seconds"])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def probe_in_subprocess(
    probe: WorkerProbe, timeout_seconds: float
) -> tuple[WorkerReport | None, str]:
    """Probes a worker in a subprocess, because Ray may hang; returns the report, or None and the
    reason."""
    import psutil

    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "jobs.doctor", "--probe", json.dumps(probe)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    began = psutil.Process(child.pid).create_time()
    try:
        out, errors = child.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        out, errors = "", f"no response in {timeout_seconds:g} s"
    finally:
        local_services.end(
            local_services.Service("doctor", child.pid, began, "", ""), timeout_seconds=3
        )
        child.kill()
        child.wait()
        for stream in (child.stdout, child.stderr):
            if stream:
                stream.close()
    for line in out.splitlines():
        if line.startswith(_REPORT):
            report: WorkerReport = json.loads(line.removeprefix(_REPORT))
            return report, ""
    lines = [line for line in errors.splitlines() if line.strip()]
    return None, lines[-1].strip() if lines else f"it ended with status {child.returncode}"


def probe_worker(probe: WorkerProbe) -> WorkerReport:
    """Runs `check_here` on a worker. Called in the subprocess."""
    from pipelines.cluster import jobs
    from pipelines.workflows.services import apply_settings

    apply_settings(Context.from_environment())
    started = time.time()
    facts, resources = jobs.run_on_worker(probe["address"], lambda: check_here(probe))
    # The worker read its clock between `started` and now: any time in this span counts as equal.
    remote, now = facts["time"], time.time()
    ahead_seconds = min(0.0, remote - started) + max(0.0, remote - now)
    return {
        **facts,
        "cpus": resources.cpus,
        "gpus": resources.gpus,
        "ahead_seconds": ahead_seconds,
    }


def check_here(probe: WorkerProbe) -> WorkerFacts:
    """Runs the checks on the worker. It is sent there, so it imports everything that it needs."""
    import importlib.metadata
    import time
    from pathlib import Path

    facts: WorkerFacts = {
        "versions": {},
        "devices": [],
        "mlflow_problem": "",
        "storage_problem": "",
        "time": 0.0,
    }
    for name in probe["libraries"]:
        try:
            facts["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts["versions"][name] = ""
    import torch

    count = torch.cuda.device_count()
    facts["devices"] = [torch.cuda.get_device_name(index) for index in range(count)]
    try:
        if Path(probe["ours"]).read_text() != probe["mark"]:
            facts["storage_problem"] = "the file has another content there"
        Path(probe["theirs"]).write_text(probe["mark"])
    except OSError as error:
        facts["storage_problem"] = f"{error.filename}: {error.strerror}"
    try:
        from pipelines.tracking import mlflow_runs

        mlflow_runs.connect(probe["tracking"])
    except Exception as error:
        facts["mlflow_problem"] = str(error).splitlines()[0]
    facts["time"] = time.time()
    return facts


if __name__ == "__main__":
    run(command, "tessera doctor")
