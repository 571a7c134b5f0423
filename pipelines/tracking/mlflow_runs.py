"""ROOM: MLflow, the runs. One training is one run, through every restart and resume.

In: a tracking address, and a training's params, metrics, tags and files. Out: `MlflowTracker`, and
the client that the registry (mlflow_registry.py) uses. MLflow is imported when a function runs,
never with this module. Must not know Ray, torch, shards or recipes; never touches MLflow's global
state.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from models.core.errors import TesseraError, hide_passwords
from pipelines import tag_names
from pipelines.interfaces import Point
from pipelines.tracking import mlflow_store
from pipelines.tracking.mlflow_errors import explain_refusal, is_refusal
from pipelines.tracking.mlflow_lock import PatientClient, wait_for_lock
from pipelines.tracking.system_metrics import Sampler

VIEW = "workflowType=machine_learning"
"""Without this in the address MLflow's pages open in their GenAI view."""

DEFAULT_UI = "http://127.0.0.1:5000"
"""Where `tessera up` serves an embedded store."""

_START_TIMEOUT_SECONDS = 5
_PARAM_LENGTH = 6000  # MLflow cuts longer ones
_DIGEST_LENGTH = 32  # MLflow takes 36 characters, a sha256 has 64
_PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}


def settings() -> dict[str, str]:
    """Environment variables that a process needs before anything in it imports MLflow.

    A request that fails raises immediately: our callers retry on their own, and MLflow's retries
    would block a thread for 246 s. Files go through the server, because the addresses of its object
    store that it would hand out are often reachable for the server alone. Nothing is unpickled, no
    telemetry is sent, nothing is printed.
    """
    return {
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_DISABLE_AGENT_HINT": "true",
        "MLFLOW_UV_AUTO_DETECT": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    }


def is_permanent(error: BaseException) -> bool:
    """True if retrying can't help: MLflow itself refused the request."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException) or error.error_code not in _PERMANENT:
        return False
    # A proxy's 404 page while the server is down doesn't come from MLflow.
    return not str(error).startswith("API request to")


def connect(uri: str | None) -> Any:
    """Returns an `MlflowClient` of a reachable service. Raises TesseraError within seconds if the
    service can't be reached.

    `None` lets MLflow choose the address. A new SQLite file is set up first, under a lock, because
    MLflow's own set-up breaks when two processes start it at the same time.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    is_file = bool(uri and uri.startswith("sqlite:///"))
    if uri and is_file:
        mlflow_store.prepare_database(Path(uri.removeprefix("sqlite:///")), upgrade=False)
    elif uri and urlsplit(uri).scheme.partition("+")[0] in mlflow_store.DATABASES:
        mlflow_store.check_database(uri)
    try:
        if uri and is_file:
            client = PatientClient(wait_for_lock(lambda: MlflowClient(tracking_uri=uri), uri))
        else:
            client = MlflowClient(tracking_uri=uri)
        if client.tracking_uri.startswith(("http://", "https://")):
            _ping(client.tracking_uri)
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise _unreachable(uri, error) from error
    return client


def open_run(
    uri: str | None,
    *,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    artifact_root: Path | None,
    public_url: str | None = None,
    run_id: str = "",
) -> MlflowTracker:
    """Returns the run of the training called `name`, found by its tag or created, and sets it
    RUNNING. A run that began as `run_id` is found in the experiment that it is in, whatever
    `experiment` is.

    `artifact_root` is where a new experiment keeps its files, unless a server decides that.
    `public_url` is the address of MLflow's pages in links, where that isn't `uri`. Raises
    TesseraError if the service can't be reached, or refuses this user.
    """
    if ("'" in name and '"' in name) or not name:
        raise TesseraError(
            f"{name!r} is not a valid name of a run", hint="use one kind of quotes, or none"
        )
    if not 0 < len(experiment.strip()) <= 500:
        raise TesseraError(
            f"{experiment[:80]!r} is not a valid name of an experiment",
            hint="use 1 to 500 characters",
        )
    client = connect(uri)
    if run_id and (known := _known_run(client, run_id, name)):
        tracker = MlflowTracker(client, known.info.experiment_id, run_id, public_url)
        tracker.tags(tags)
        client.update_run(run_id, status="RUNNING")
        return tracker
    with explain_refusal(f"experiment {experiment!r}", "name an experiment of your own"):
        experiment_id = _experiment_id(client, experiment, artifact_root)
        runs = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{tag_names.RUN}` = {quoted(name)}",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        if runs:
            tracker = MlflowTracker(client, experiment_id, runs[0].info.run_id, public_url)
            tracker.tags(tags)
        else:
            all_tags = {**_context_tags(), **tags, tag_names.RUN: name}
            run = client.create_run(experiment_id, tags=all_tags, run_name=name)
            tracker = MlflowTracker(client, experiment_id, run.info.run_id, public_url)
        client.update_run(tracker.run_id, status="RUNNING")
    return tracker


def _known_run(client: Any, run_id: str, name: str) -> Any:
    """The run of this id, if it is the training of this name; None if there is none here, as in
    another store than the one that it began in."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not is_permanent(error) and not is_refusal(error):
            raise
        return None
    is_same = run.data.tags.get(tag_names.RUN) == name and run.info.lifecycle_stage == "active"
    return run if is_same else None


def quoted(name: str) -> str:
    """A name in quotes, for a query of MLflow, which has no way to write both kinds of quotes."""
    return f'"{name}"' if "'" in name else f"'{name}'"


def attach_run(uri: str | None, run_id: str, *, public_url: str | None = None) -> MlflowTracker:
    """Returns the tracker of an existing run with its status unchanged. Raises TesseraError if
    there is no such run."""
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    try:
        with explain_refusal(f"run {run_id!r}"):
            run = client.get_run(run_id)
    except MlflowException as error:
        if not is_permanent(error):
            raise
        raise TesseraError(f"MLflow has no run {run_id!r}", hint="give the id of a run") from error
    return MlflowTracker(client, run.info.experiment_id, run.info.run_id, public_url)


class MlflowTracker:
    """`interfaces.Tracker` over one MLflow run. Methods raise MLflow's own error if it is
    unreachable."""

    def __init__(
        self, client: Any, experiment_id: str, run_id: str, public_url: str | None
    ) -> None:
        self.run_id = run_id
        self.experiment_id = experiment_id
        self._client = client
        self._public_url = public_url
        self._sampler: Sampler | None = None

    @property
    def uri(self) -> str:
        return str(self._client.tracking_uri)

    def status(self) -> str:
        """RUNNING, FINISHED, FAILED or KILLED."""
        return str(self._client.get_run(self.run_id).info.status)

    def params(self, values: Mapping[str, str]) -> None:
        """Raises TesseraError if a parameter was logged before with another value."""
        from mlflow.entities import Param

        values = {key: hide_passwords(str(value)) for key, value in values.items()}
        known = self._client.get_run(self.run_id).data.params
        for key, value in values.items():
            if key in known and known[key] != str(value)[:_PARAM_LENGTH]:
                raise TesseraError(
                    f"parameter {key!r} was logged before with another value: {known[key]}",
                    hint="a run's parameters can't change: start a new run",
                )
        new = [Param(key, str(value)) for key, value in values.items() if key not in known]
        if new:
            self._client.log_batch(self.run_id, params=new)

    def tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        pairs = [RunTag(key, hide_passwords(str(value))) for key, value in values.items()]
        for start in range(0, len(pairs), 100):
            self._client.log_batch(self.run_id, tags=pairs[start : start + 100])

    def metrics(self, points: Sequence[Point]) -> None:
        """Idempotent: each value carries the time at which it was made."""
        from mlflow.entities import Metric

        rows = [
            Metric(key, value, point.time_ms, point.step)
            for point in points
            for key, value in point.values.items()
        ]
        if rows:
            self._client.log_batch(self.run_id, metrics=rows)  # which sends a thousand at a time

    def artifact(self, path: Path, folder: str) -> None:
        """Stores a file, or a folder under its own name, in the run's `folder`."""
        if not path.exists():
            raise FileNotFoundError(path)
        self._client.log_artifact(self.run_id, str(path), folder or None)

    def image(self, path: Path, key: str, step: int, time_ms: int) -> None:
        """Stores a PNG as one of a series, which MLflow's metrics page shows with a slider over the
        steps. The files are those of MLflow's `log_image`, except for the random part of their
        names: it is derived from the image's key and time, so logging an image twice stores one."""
        from mlflow.tracking.multimedia import compress_image_size
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
        from PIL import Image

        random_part = uuid.uuid5(uuid.NAMESPACE_OID, f"{self.run_id} {key} {step} {time_ms}")
        stem = f"{key}+step+{step}+timestamp+{time_ms}+{random_part}"
        with tempfile.TemporaryDirectory() as scratch:
            full = Path(scratch, f"{stem}.png")
            shutil.copyfile(path, full)
            small = Path(scratch, f"{stem}+compressed.webp")
            with Image.open(path) as image:
                compress_image_size(image).save(small)
            for file in (full, small):
                self._client.log_artifact(self.run_id, str(file), "images")
        self._client.set_tag(self.run_id, MLFLOW_LOGGED_IMAGES, True)

    def dataset(self, *, name: str, digest: str, source: str, split: str) -> None:
        """Logs a split as an input of the run. `source` is a path or an address."""
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        scheme = urlsplit(source).scheme
        is_http = scheme in ("http", "https")
        dataset = Dataset(
            # MLflow keeps one input per name and digest. Without the split in the name only the
            # first split would be kept.
            name=f"{name}/{split}",
            digest=digest[:_DIGEST_LENGTH],
            source_type="http" if is_http else scheme or "local",
            source=json.dumps({"url" if is_http else "uri": hide_passwords(source)}),
        )
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", split)])]
        try:
            self._client.log_inputs(self.run_id, inputs)
        except MlflowException:
            # If two runs log a dataset to an experiment for the first time in parallel, the store
            # lets one fail. The second attempt finds the other run's entry.
            self._client.log_inputs(self.run_id, inputs)

    def start_system_metrics(self, interval_seconds: float = 10.0) -> None:
        """Samples this machine's CPU, memory, disk, network and GPUs until `finish`."""
        if self._sampler is None:
            known = self._client.get_run(self.run_id).data._metric_objs
            steps = [m.step for m in known if m.key.startswith("system/")]
            first = max(steps, default=-1) + 1
            self._sampler = Sampler(self.metrics, interval_seconds, first)
            self._sampler.start()

    def tags_and_params(self) -> tuple[dict[str, str], dict[str, str]]:
        """Returns the run's (tags, params)."""
        data = self._client.get_run(self.run_id).data
        return dict(data.tags), dict(data.params)

    def finish(self, status: str) -> None:
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None
        self._client.set_terminated(self.run_id, status)

    def link(self) -> str:
        base = page_root(self.uri, self._public_url)
        return f"{base}/#/experiments/{self.experiment_id}/runs/{self.run_id}?{VIEW}"


def page_root(uri: str, public_url: str | None) -> str:
    """The address of the web pages of the service at `uri`: `public_url` if there is one, else
    `uri` without a password, or where `tessera up` serves an embedded store."""
    if public_url:
        return public_url.rstrip("/")
    if not uri.startswith(("http://", "https://")):
        return DEFAULT_UI
    return _without_password(uri).rstrip("/")


def _context_tags() -> dict[str, str]:
    """User, source and git commit. If the command is outside of a repository, as an installed
    `tessera` is, the commit is that of this file."""
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.utils.git_utils import get_git_branch, get_git_commit

    tags: dict[str, str] = dict(resolve_tags())
    if "mlflow.source.git.commit" not in tags and (commit := get_git_commit(__file__)):
        tags["mlflow.source.git.commit"] = commit
        if branch := get_git_branch(__file__):
            tags["mlflow.source.git.branch"] = branch
    return tags


def _experiment_id(client: Any, name: str, artifact_root: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = None
        root = artifact_root
        if client.tracking_uri.startswith("sqlite:///"):
            # Otherwise MLflow takes a folder in this process's working directory.
            database = Path(client.tracking_uri.removeprefix("sqlite:///"))
            root = root or mlflow_store.embedded_artifacts(database.parent)
        if root is not None and not client.tracking_uri.startswith(("http://", "https://")):
            location = str(root.absolute())
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
    if experiment.lifecycle_stage == "deleted":
        raise TesseraError(
            f"experiment {name!r} was deleted in MLflow",
            hint=f"restore it: mlflow experiments restore -x {experiment.experiment_id}, "
            "or name another experiment",
        )
    return str(experiment.experiment_id)


def _ping(uri: str) -> None:
    """One request without retries, to find out quickly whether the server is there."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    host = get_default_host_creds(uri)
    http_request(host, "/version", "GET", max_retries=0, timeout=_START_TIMEOUT_SECONDS)


def _unreachable(uri: str | None, error: Exception) -> TesseraError:
    where = _without_password(uri) if uri else "its default address"
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
    what = " ".join(str(cause).split())[:300]
    if is_refusal(error):
        return TesseraError(
            f"MLflow at {where} refuses this user or this address: {what}",
            hint="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or use the address "
            "that the server allows (--allowed-hosts)",
        )
    return TesseraError(
        f"MLflow at {where} can't be used: {what}",
        hint="start it (tessera up), or correct MLFLOW_TRACKING_URI, or unset it to use the "
        "embedded store",
    )


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return (
        urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else uri
    )
