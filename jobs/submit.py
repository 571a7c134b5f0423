"""`tessera submit VERB …`: runs a verb as a job on a running Ray cluster.

In: a verb with its arguments. Out: the job's log on stdout, and its exit status as ours. The code
of a checkout is sent with the job; data and secrets are not: the cluster's own environment, or
files on its machines, log a job in.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import click

from jobs.cli import run, unknown_verb, verbs
from jobs.shared import local_services
from models.core.errors import TesseraError, UsageError, hide_passwords
from pipelines.workflows.context import Context

LOCAL_VERBS = {"up", "down", "status", "submit"}
"""Verbs that manage services on this machine. They can't be submitted."""

_PASSED_ON = ("OMP_NUM_THREADS", "MLFLOW_PUBLIC_URL")
_SECRETS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
"""Never sent: Ray stores a job's variables in plain text and shows them to all who may list jobs.
The cluster has its own."""
_PROBE_SECONDS = 20.0
"""A head whose machine is busy takes more than the usual 3 seconds to list its jobs."""
_RAY_MESSAGES = re.compile(
    r"^(\d{4}-\d\d-\d\d \S+\tINFO job_manager\.py.*|Running entrypoint for job .*)\n", re.MULTILINE
)
_BEGUN = re.compile(r"^(run|search) (.+)$", re.MULTILINE)
"""The line with which a training or a search says its name."""
_PATH_METAVARS = ("DIR", "FILE", "PATHS…")


GROUP = "services"


@click.command(
    short_help="Run a verb as a job on a running Ray cluster.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
)
@click.option("--no-wait", is_flag=True, help="Print the job's ID and return immediately.")
@click.option("--json", "as_json", is_flag=True, help="Print the job's ID and outcome as JSON.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.argument("verb")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    no_wait: bool, as_json: bool, verbose: bool, verb: str, arguments: tuple[str, ...]
) -> int:
    """Run VERB with its ARGUMENTS as a job on a running Ray cluster.

    For example: tessera submit train cnn --data DIR

    The cluster is RAY_API_SERVER_ADDRESS, RAY_ADDRESS if that begins with http, or what
    `tessera up` started. The command follows the job's log and exits with its status; Ctrl-C asks
    before it stops the job.

    Relative paths are made absolute, from the current folder: options that name a path, and
    arguments with a slash that exist here. The cluster's machines must see the same files under the
    same paths.
    """
    del verbose
    check(verb, arguments)
    address, local = find_cluster()
    if reason := local_services.probe_url(
        f"{address}/api/jobs/",
        bearer=local_services.token(os.environ),
        timeout_seconds=_PROBE_SECONDS,
    ):
        raise TesseraError(
            f"no Ray cluster accepts jobs at {address}: {reason}",
            hint="start one with `tessera up`, or set RAY_API_SERVER_ADDRESS (and RAY_AUTH_MODE="
            "token with RAY_AUTH_TOKEN_PATH if it requires a token)",
        )
    from pipelines.cluster.jobs import Jobs
    from pipelines.cluster.session import user_name

    if note := unsent_secrets(local):
        click.echo(note, err=True)
    cluster = Jobs(address)
    job = cluster.submit(
        shlex.join(["python", "-m", f"jobs.{verb}", *settle_paths(verb, arguments)]),
        source=source_root(),
        environment=environment_for_job(local),
        metadata={"verb": verb, "user": user_name(), "job_submission": "tessera submit"},
    )
    if no_wait:
        show(as_json, job)
        return 0
    print(f"job {job} on {address}", file=sys.stderr)
    return wait_for(cluster, job, as_json)


def check(verb: str, arguments: tuple[str, ...]) -> None:
    """Refuses a wrong verb or option here, instead of in the job seconds later."""
    if any(hide_passwords(word) != word for word in arguments):
        raise UsageError(
            "an argument has a password, and Ray shows a job's command to all who list jobs",
            hint="give the address without it, and set the credentials on the cluster",
        )
    allowed = [name for name in verbs() if name not in LOCAL_VERBS]
    if verb in LOCAL_VERBS:
        raise UsageError(f"{verb!r} can't be submitted: it manages services on this machine")
    if verb not in allowed:
        raise unknown_verb(verb, allowed)
    parse(verb, arguments)
    if verb == "train":
        from jobs import train

        train.check(train.command.make_context("tessera train", list(arguments)).params)


def parse(verb: str, arguments: tuple[str, ...]) -> dict[str, object]:
    """The verb's options as text, by parameter. Raises click.UsageError for an unknown option."""
    import importlib

    command: click.Command = importlib.import_module(f"jobs.{verb}").command
    context = click.Context(command, info_name=f"tessera {verb}")
    values, _, _ = command.make_parser(context).parse_args(list(arguments))
    return dict(values)


def settle_paths(verb: str, arguments: tuple[str, ...]) -> list[str]:
    """The arguments, with relative paths made absolute."""
    import importlib

    command: click.Command = importlib.import_module(f"jobs.{verb}").command
    values = parse(verb, arguments)
    paths: set[str] = set()
    for parameter in command.params:
        is_path = parameter.metavar in _PATH_METAVARS or isinstance(parameter.type, click.Path)
        if is_path and parameter.name in values:
            given = values[parameter.name]
            several = given if isinstance(given, list | tuple) else [given]
            paths |= {value for value in several if isinstance(value, str)}

    def settle(text: str) -> str:
        named = text in paths or ("/" in text and Path(text).exists())
        remote = "://" in text or ":/" in text or text == "-"
        return str(Path(text).expanduser().absolute()) if named and not remote else text

    return [
        f"{head}={settle(value)}" if word.startswith("-") and equals else settle(word)
        for word in arguments
        for head, equals, value in [word.partition("=")]
    ]


def find_cluster() -> tuple[str, bool]:
    """The dashboard's address, and whether it is the one that `tessera up` started."""
    up = local_services.load(Context.from_environment().home)
    ours = up.environment["RAY_API_SERVER_ADDRESS"] if up else ""
    given = os.environ.get("RAY_API_SERVER_ADDRESS") or ""
    fallback = os.environ.get("RAY_ADDRESS") or ""
    if not given and fallback.startswith(("http://", "https://")):
        given = fallback
    if not given and fallback and not (up and fallback == up.environment["RAY_ADDRESS"]):
        raise UsageError(
            f"RAY_ADDRESS is {fallback!r}, which accepts no jobs",
            hint="set RAY_API_SERVER_ADDRESS to the dashboard's address, as in http://HOST:8265",
        )
    address = (given or ours).rstrip("/")
    if not address:
        raise TesseraError(
            "there is no Ray cluster to submit to",
            hint="start one with `tessera up`, or set RAY_API_SERVER_ADDRESS=http://HOST:8265",
        )
    if address == ours and up:
        os.environ.update(local_services.with_password(up.environment))
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the cluster's own
    return address, address == ours


def environment_for_job(local: bool) -> dict[str, str]:
    """What the job gets on top of the cluster's own environment."""
    from pipelines.cluster.session import user_name

    environment = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or ""
    host = urlsplit(tracking).hostname or ""
    # An address of this machine would mean another machine there: the cluster has its own.
    if host and (local or host not in ("localhost", "127.0.0.1", "::1")):
        environment["MLFLOW_TRACKING_URI"] = without_password(tracking)
    if storage := Context.from_environment().storage:
        environment["TESSERA_STORAGE"] = storage
    if local:
        environment["TESSERA_HOME"] = str(Context.from_environment().home)
    if commit := git("rev-parse", "HEAD"):
        # MLflow reads these tags from the variable: the code that is sent has no git history.
        tags = {"mlflow.source.git.commit": commit, "mlflow.user": user_name()}
        if branch := git("branch", "--show-current"):
            tags["mlflow.source.git.branch"] = branch
        environment["MLFLOW_RUN_CONTEXT"] = json.dumps(tags)
    return environment


def unsent_secrets(local: bool) -> str:
    """A line that names the submitter's secrets, which the job doesn't get; empty without any.
    What `tessera up` started has its login to MLflow already."""
    own = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD") if local else ()
    held = [name for name in _SECRETS if os.environ.get(name) and name not in own]
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or ""
    if without_password(tracking) != tracking:
        held.append("the password in MLFLOW_TRACKING_URI")
    if not held:
        return ""
    return (
        f"not sent, because Ray shows a job's variables: {', '.join(held)}; "
        "those of the cluster count"
    )


def without_password(address: str) -> str:
    """An address without `user:password@`."""
    parts = urlsplit(address)
    if not parts.netloc:
        return address
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def git(*arguments: str) -> str:
    """Output of a git command in this checkout; empty if it fails."""
    root = source_root()
    if root is None or not shutil.which("git"):
        return ""
    command = ["git", "-C", str(root), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return process.stdout.strip() if process.returncode == 0 else ""


def source_root() -> Path | None:
    """The checkout that this runs from. None if Tessera is installed as a package: then it must be
    installed on the cluster too."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def wait_for(cluster: object, job: str, as_json: bool) -> int:
    """Follows the job to its end and returns its exit status."""
    from pipelines.cluster.jobs import Jobs, LostJobError

    assert isinstance(cluster, Jobs)
    seen, begun = 0, ""

    def write(text: str) -> None:
        nonlocal seen, begun
        seen += len(text)
        if not begun and (named := _BEGUN.search(text)):
            verb = "train" if named[1] == "run" else "tune"
            begun = shlex.join(["tessera", "submit", verb, "--resume", named[2]])
        text = _RAY_MESSAGES.sub("", text)
        print(text, end="", flush=True, file=sys.stderr if as_json else sys.stdout)

    while True:
        try:
            cluster.follow(job, write, skip=seen)
            break
        except LostJobError as lost:
            hint = f"when it is back: {begun or 'submit the job again'}"
            raise LostJobError(lost.message, hint=hint) from lost
        except KeyboardInterrupt:
            if not confirm_stop(job):
                continue
            if not cluster.stop(job):
                print(
                    f"job {job} is still waiting for resources and can't be stopped yet",
                    file=sys.stderr,
                )
                return 1
    outcome = cluster.result(job)
    if outcome.status == "STOPPED":
        status = 128 + signal.SIGINT
    elif outcome.exit_code is None:
        status = 0 if outcome.status == "SUCCEEDED" else 1
    else:
        status = outcome.exit_code if outcome.exit_code >= 0 else 128 - outcome.exit_code
    if outcome.status == "FAILED" and outcome.exit_code is None:
        print(f"job {job} failed: {outcome.message.strip()}", file=sys.stderr)
    if as_json:
        show(as_json, job, status=outcome.status, exit_status=status)
    return status


def confirm_stop(job: str) -> bool:
    """True to stop the job, False to keep following it. A second Ctrl-C, or no terminal, raises and
    leaves the job running."""
    try:
        if sys.stdin.isatty():
            return click.confirm("\nstop the job?", default=False, err=True)
    except (click.Abort, KeyboardInterrupt):
        pass
    raise TesseraError(
        f"job {job} keeps running",
        hint=f"follow it with `ray job logs --follow {job}`, stop it with `ray job stop {job}`",
    )


def show(as_json: bool, job: str, **outcome: object) -> None:
    from jobs.shared.terminal import show_json

    if as_json:
        show_json({"job": job, **outcome})
    else:
        click.echo(job)


if __name__ == "__main__":
    run(command, "tessera submit")
