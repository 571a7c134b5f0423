"""`tessera doctor`: checks that jobs have everything they need, here and on all machines.

In: the environment. Out: the checks of this machine, a table with a row for each machine of the
cluster, and every problem with a hint. The time is limited: what may hang runs in a subprocess,
which is ended at the limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from jobs.cli import run
from jobs.shared import local_services
from jobs.shared.storage_option import settings_with, storage_option
from jobs.shared.terminal import show_json
from models.core.errors import hide_passwords
from pipelines.workflows import doctor
from pipelines.workflows.context import Context
from pipelines.workflows.doctor import Finding

GROUP = "services"

_REPORT = "doctor's report: "
_DATA = "TESSERA_DOCTOR_DATA"
"""The variable with which the subprocess gets --data: other users see the words of a command."""


@click.command(short_help="Check libraries, Ray, MLflow and every machine of the cluster.")
@click.option(
    "--data",
    metavar="DIR",
    envvar=_DATA,
    help="Also check that every machine can read this data set (a folder or an address).",
)
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(1),
    default=180,
    show_default=True,
    help="Seconds that Ray and all machines may take.",
)
@click.option("--probe", is_flag=True, hidden=True, help="Ask the cluster, in the subprocess.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(
    data: str | None,
    storage: str | None,
    as_json: bool,
    timeout_seconds: float,
    probe: bool,
    verbose: bool,
) -> int:
    """Check versions, Ray and MLflow here, and every machine of the cluster.

    Each machine reports its versions, GPUs, shared memory, free disk and clock. It writes to the
    storage of runs and reads what the others wrote, writes to MLflow, and connects to the others.
    The cluster is the one at RAY_ADDRESS, what `tessera up` started, or a Ray that is started for
    the check. For a remote cluster use `tessera submit doctor`. The exit status is 1 if a check
    fails.
    """
    del verbose
    use_local_services()
    context = settings_with(storage)
    if probe:
        found = doctor.check_cluster(context, data=data, timeout_seconds=timeout_seconds)
        click.echo(_REPORT + json.dumps([asdict(finding) for finding in found]))
        return 0
    findings = [
        *doctor.check_versions(),
        *doctor.check_tracking(context.tracking_uri),
        doctor.check_private(context),
    ]
    if not as_json:
        show(findings)
    cluster = check_cluster(context, data, timeout_seconds)
    if as_json:
        show_json([asdict(finding) for finding in [*findings, *cluster]])
    else:
        show([finding for finding in cluster if not finding.machine])
        show_machines([finding for finding in cluster if finding.machine])
    return int(doctor.has_failed([*findings, *cluster]))


def use_local_services() -> None:
    """Uses what `tessera up` started, unless the environment names another cluster."""
    up = local_services.load(Context.from_environment().home)
    if up and "RAY_ADDRESS" not in os.environ and all(map(local_services.is_alive, up.services)):
        for name, value in local_services.with_password(up.environment).items():
            os.environ.setdefault(name, value)


# ── what is shown ─────────────────────────────────────────────────────────────────────────────


def show(findings: Sequence[Finding]) -> None:
    """A line for each check, and the hint of each that isn't ok."""
    for finding in findings:
        click.echo(hide_passwords(f"{finding.state:<5} {finding.check:<15} {finding.detail}"))
        if finding.hint and finding.state != "ok":
            click.echo(f"{'':<21} → {finding.hint}")


def show_machines(findings: Sequence[Finding]) -> None:
    """A table with a row for each machine, then each problem, and each hint once."""
    if not findings:
        return
    click.echo()
    for line in table(findings):
        click.echo(line)
    problems = [finding for finding in findings if finding.state != "ok"]
    if problems:
        click.echo()
    for hint in dict.fromkeys(finding.hint for finding in problems):
        for finding in problems:
            if finding.hint == hint:
                line = f"{finding.state:<5} {finding.machine}: {finding.check}: {finding.detail}"
                click.echo(hide_passwords(line))
        click.echo(f"{'':<5} → {hint}")


def table(findings: Sequence[Finding]) -> Iterator[str]:
    """The lines of the table: what was found where all is well, otherwise warn or fail."""
    cells: dict[str, dict[str, str]] = {}
    for finding in findings:
        cell = finding.detail if finding.state == "ok" else finding.state
        cells.setdefault(finding.machine, {})[finding.check] = cell
    used = {check for row in cells.values() for check in row}
    heads = [check for check in ("ray", *doctor.MACHINE_CHECKS) if check in used]
    rows = [["machine", *heads]]
    rows += [[name, *(row.get(check, "") for check in heads)] for name, row in cells.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


# ── the subprocess ────────────────────────────────────────────────────────────────────────────


def check_cluster(context: Context, data: str | None, timeout_seconds: float) -> list[Finding]:
    """`doctor.check_cluster` in a subprocess, because Ray may hang."""
    arguments = ["--probe", "--timeout", str(timeout_seconds)]
    variables = {_DATA: data or "", "TESSERA_STORAGE": context.storage or ""}
    out, problem = run_limited(arguments, timeout_seconds, variables)
    for line in out.splitlines():
        if line.startswith(_REPORT):
            return [Finding(**each) for each in json.loads(line.removeprefix(_REPORT))]
    hint = "see `tessera status`; unset RAY_ADDRESS to use an embedded Ray"
    return [Finding("ray", "fail", f"{context.ray_address or 'a local Ray'}: {problem}", hint)]


def run_limited(
    arguments: Sequence[str], timeout_seconds: float, variables: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """The output of `tessera doctor ARGUMENTS` with these environment variables, and why it failed
    if it did. It ends at the limit, with all processes that it started."""
    import psutil

    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "jobs.doctor", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **(variables or {})},
        start_new_session=True,
    )
    began = local_services.start_time(psutil.Process(child.pid))
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
    lines = [line for line in errors.splitlines() if line.strip()]
    return out, lines[-1].strip() if lines else f"it ended with status {child.returncode}"


if __name__ == "__main__":
    run(command, "tessera doctor")
