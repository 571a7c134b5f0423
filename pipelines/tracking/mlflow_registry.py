"""ROOM: MLflow, the registry: versions, aliases, and the record of who was champion.

In: folders of model files. Out: `MlflowRegistry`. Versions are promoted by alias, never by stage,
and loading a version executes nothing. Must not know what is in the files.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from models.core.errors import TesseraError, UsageError, hide_passwords, unknown
from pipelines import tag_names
from pipelines.interfaces import Decision, Version
from pipelines.tracking import mlflow_files
from pipelines.tracking.mlflow_errors import RefusedError, explain_refusal
from pipelines.tracking.mlflow_runs import VIEW, connect, page_root, quoted

T = TypeVar("T")

RECORD = ".champions"
"""Suffix of the registered model that holds another model's record of champions."""

_NAME_LENGTH = 256
_REFUSED = "/:\\"
_RETRY_SECONDS = 120.0
_TRANSIENT = {"TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "BAD_REQUEST", "REQUEST_LIMIT_EXCEEDED"}
_DEFAULT_STORE = threading.Lock()


class MlflowRegistry:
    """`interfaces.Registry` over MLflow. `uri` and `public_url` as for `mlflow_runs.open_run`."""

    def __init__(self, uri: str | None, *, public_url: str | None = None) -> None:
        self._client = connect(uri)
        self._public_url = public_url

    def register(
        self, name: str, directory: Path, *, run_id: str, tags: Mapping[str, str], step: int = 0
    ) -> Version:
        """Stores the files of `directory` as a logged model of the run, and registers it as a new
        version. A version exists only once its files are stored."""
        from mlflow.entities import LoggedModelOutput

        check_name(name)
        tags = {key: hide_passwords(value) for key, value in tags.items()}
        if name.endswith(RECORD):
            raise UsageError(
                f"{name!r} is not a valid name of a model: {RECORD} is for records of champions",
                hint=f"call it {name.removesuffix(RECORD)!r}",
            )
        client = self._client
        with _explain_missing(
            f"run {run_id!r} isn't in MLflow", "give the run that the model comes from"
        ):
            experiment_id = _retry(lambda: client.get_run(run_id)).info.experiment_id
        # A logged model's name allows fewer characters than a registered model's.
        label = "".join("-" if c in "/:.%\"'" else c for c in f"{name}-{step}")
        model_id = _retry(
            lambda: client.create_logged_model(
                experiment_id, label, source_run_id=run_id, tags=dict(tags)
            )
        ).model_id
        try:
            _retry(lambda: client.log_model_artifacts(model_id, str(directory)))
        except BaseException:
            client.finalize_logged_model(model_id, "FAILED")
            raise
        _retry(lambda: client.finalize_logged_model(model_id, "READY"))
        _retry(lambda: client.log_outputs(run_id, [LoggedModelOutput(model_id, step=step)]))
        number = _retry(
            lambda: self._add_version(name, model_id, run_id, tags),
            f"a new version of model {name!r}",
        )
        # The link from the logged model's page to the version's, as MLflow's own tools set it.
        link = json.dumps([{"name": name, "version": number}])
        _retry(lambda: client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link}))
        return self.version(name, number)

    def _add_version(self, name: str, model_id: str, run_id: str, tags: Mapping[str, str]) -> int:
        """Returns the number of this logged model's version, and creates it only if it doesn't
        exist: a retry after a lost response must not create a second one."""
        from mlflow.exceptions import MlflowException

        source = f"models:/{model_id}"
        try:
            # Before any question about the name: MLflow with users refuses those about a model
            # that isn't there. Who creates a model may do everything with it.
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for row in self._rows(name):
            if row.source == source:
                return int(row.version)
        with _default_store(self._client.tracking_uri):
            created = self._client.create_model_version(
                name, source=source, run_id=run_id, tags=dict(tags), model_id=model_id
            )
        return int(created.version)

    def version(self, name: str, ref: str | int) -> Version:
        check_name(name)
        versions = self.versions(name)
        if not versions:
            known = self.names()
            if not known:
                raise TesseraError("no model is registered yet", hint="train one: tessera train")
            raise unknown("model", name, known)
        for version in versions:
            if str(version.number) == str(ref) or str(ref) in version.aliases:
                return version
        aliases = sorted(alias for version in versions for alias in version.aliases)
        numbers = ", ".join(str(version.number) for version in versions)
        raise TesseraError(
            f"model {name!r} has no version or alias {str(ref)!r}",
            hint=f"it has version{'s' if len(versions) > 1 else ''} {numbers}, and "
            + (f"the aliases {', '.join(aliases)}" if aliases else "no alias"),
        )

    def versions(self, name: str) -> list[Version]:
        from mlflow.exceptions import MlflowException

        check_name(name)
        # A search first, which finds nothing: MLflow with users answers 403, not 404, to a direct
        # question for a model that isn't there.
        rows = list(self._rows(name))
        if not rows:
            return []
        try:
            aliases = dict(_retry(lambda: self._client.get_registered_model(name)).aliases)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return []
        held: dict[int, list[str]] = {}
        for alias, number in aliases.items():
            held.setdefault(int(number), []).append(alias)
        versions = [
            Version(
                name,
                int(row.version),
                row.run_id or "",
                dict(row.tags),
                tuple(sorted(held.get(int(row.version), ()))),
            )
            for row in rows
        ]
        return sorted(versions, key=lambda version: version.number)

    def names(self) -> list[str]:
        models = _pages(lambda token: self._client.search_registered_models(page_token=token))
        return sorted(model.name for model in models if tag_names.RECORD_OF not in model.tags)

    def _rows(self, name: str) -> Iterator[Any]:
        """MLflow's own entities of a model's versions."""
        query = f"name = {quoted(name)}"
        return _pages(lambda token: self._client.search_model_versions(query, page_token=token))

    def tag(self, version: Version, values: Mapping[str, str]) -> None:
        with _explain_missing(f"model {version.name!r} has no version {version.number}"):
            for key, value in values.items():
                self._set_tag(version.name, version.number, key, str(value))

    def _set_tag(self, name: str, number: int, key: str, value: str) -> None:
        _retry(lambda: self._client.set_model_version_tag(name, str(number), key, value))

    def alias(self, name: str, alias: str, number: int) -> None:
        """Moves `alias` to the version `number`."""
        from mlflow.exceptions import MlflowException

        try:
            # Retry: if two clients set the first alias at the same time, the server lets one fail.
            _retry(lambda: self._client.set_registered_model_alias(name, alias, str(number)))
        except RefusedError:
            self.version(name, number)  # raises and lists what exists
            raise
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                self.version(name, number)  # raises and lists what exists
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise UsageError(
                f"{alias!r} is not a valid alias",
                hint="use letters, digits, - and _, but not 'latest' nor 'v' with a number",
            ) from None

    def delete(self, version: Version) -> None:
        with (
            _explain_missing(f"model {version.name!r} has no version {version.number}"),
            explain_refusal(f"the deletion of version {version.number}"),
        ):
            self._client.delete_model_version(version.name, str(version.number))

    def missing(self, version: Version) -> str:
        from mlflow.exceptions import MlflowException

        try:
            run = _retry(lambda: self._client.get_run(version.run_id))
            location = self._location(version)
        except RefusedError:
            return "its run isn't in MLflow, or this user may not see it"
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return "its run isn't in MLflow"
        if run.info.lifecycle_stage == "deleted":
            return "its run was deleted"
        experiment = _retry(lambda: self._client.get_experiment(run.info.experiment_id))
        root = experiment.artifact_location.removeprefix("file://").rstrip("/")
        location = location.removeprefix("file://")
        if not location.startswith(f"{root}/") or ".." in location.split("/"):
            return f"its files are in {location}, outside of its run's experiment"
        return ""

    def _location(self, version: Version) -> str:
        """The address of a version's files."""
        number = str(version.number)
        return str(
            _retry(lambda: self._client.get_model_version_download_uri(version.name, number))
        )

    def decide(self, name: str, decision: Decision) -> None:
        """The record is a registered model of its own, NAME.champions. The server numbers its
        versions, and that is the order of the decisions."""
        with _explain_missing(f"model {name!r} has no version {decision.target}"):
            target = str(decision.target)
            version = _retry(lambda: self._client.get_model_version(name, target))
        record = f"{name}{RECORD}"
        query = f"name = {quoted(record)}"
        if not _retry(lambda: self._client.search_model_versions(query, max_results=1)):
            _retry(lambda: self._create_record(record, name))
        tags = {
            f"{tag_names.DECISION_PREFIX}{key}": str(value)
            for key, value in asdict(decision).items()
        }

        def create() -> None:
            with _default_store(self._client.tracking_uri):
                # The version's own source: MLflow can't read models:/NAME/NUMBER with every name.
                self._client.create_model_version(
                    record,
                    source=version.source,
                    run_id=version.run_id,
                    model_id=version.source.removeprefix("models:/"),
                    tags=tags,
                )

        _retry(create)

    def _create_record(self, record: str, name: str) -> None:
        """Creates the model that holds the decisions, unless another client did so first."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(
                record,
                tags={tag_names.RECORD_OF: name},
                description=f"The decisions about the champion of {name}, in order.",
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def decisions(self, name: str) -> list[Decision]:
        decisions = []
        for row in self._rows(f"{name}{RECORD}"):
            fields = {
                key.removeprefix(tag_names.DECISION_PREFIX): value
                for key, value in row.tags.items()
                if key.startswith(tag_names.DECISION_PREFIX)
            }
            try:
                decisions.append(
                    Decision(
                        number=int(row.version),
                        base=int(fields["base"]),
                        target=int(fields["target"]),
                        before=None if fields["before"] == "None" else int(fields["before"]),
                        kind=fields["kind"],
                        token=fields["token"],
                        done=fields["done"] == "True",
                    )
                )
            except (KeyError, ValueError):  # not one of ours: it decides nothing
                continue
        return sorted(decisions, key=lambda decision: decision.number)

    def done(self, name: str, decision: Decision) -> None:
        self._set_tag(
            f"{name}{RECORD}", decision.number, f"{tag_names.DECISION_PREFIX}done", "True"
        )

    def download(self, version: Version, to: Path) -> Path:
        """Downloads the version's files to the folder `to`/NAME-NUMBER, which appears once it is
        complete. Raises TesseraError if it exists already, and if the files can't be had."""
        target = to / f"{version.name}-{version.number}"
        if target.exists():
            raise TesseraError(f"{target} exists already", hint="remove it, or name another folder")
        to.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=to, prefix=".download-") as scratch,
            _explain_missing(
                f"the files of model {version.name!r} version {version.number} are gone"
            ),
        ):
            # By address: MLflow would look "models:/…" up in its default store.
            location = self._location(version)
            files = Path(scratch) / "files"
            files.mkdir()
            what = f"the files of model {version.name!r} version {version.number}"
            with _explain_missing(
                f"{what} are gone: nothing is in {location}",
                "put them back there, or train again and register a new version",
            ):
                fetched = mlflow_files.download(location, files, self._client.tracking_uri, what)
            os.replace(fetched, target)
        return target

    def link(self, version: Version) -> str:
        base = page_root(self._client.tracking_uri, self._public_url)
        return f"{base}/#/models/{quote(version.name, safe='')}/versions/{version.number}?{VIEW}"


def check_name(name: str) -> str:
    """Returns the name, composed (NFC). Raises UsageError if MLflow or a path can't hold it."""
    if (
        not name.strip()
        or len(name) > _NAME_LENGTH
        or any(c in _REFUSED or not c.isprintable() for c in name)
        or ("'" in name and '"' in name)
        or name in (".", "..")
    ):
        raise UsageError(
            f"{name!r} is not a valid name of a model",
            hint=f"use at most {_NAME_LENGTH} letters of any alphabet, digits, spaces and signs, "
            "but not / : \\, and not both kinds of quotes",
        )
    return unicodedata.normalize("NFC", name)


def valid_name(text: str) -> str:
    """A valid name of a model that is like `text`: other characters become -."""
    composed = unicodedata.normalize("NFC", text)
    kept = "".join("-" if c in f'{_REFUSED}@"' or not c.isprintable() else c for c in composed)
    return kept.strip(". ")[:_NAME_LENGTH] or "model"


@contextmanager
def _explain_missing(message: str, hint: str = "") -> Iterator[None]:
    """Raises TesseraError(message) where MLflow raises RESOURCE_DOES_NOT_EXIST, and where it
    refuses, which is how a server with users answers for what isn't there."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except RefusedError as error:
        raise TesseraError(
            f"{message}, or this user may not use it", hint=hint or error.hint
        ) from error
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TesseraError(message, hint=hint) from error


@contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """Makes `uri` MLflow's default store for one call. MLflow's SQL registry always looks a logged
    model up in the default store (a TODO in its source). The public setter isn't used, because it
    overwrites the user's MLFLOW_TRACKING_URI."""
    from mlflow.tracking._tracking_service import utils

    with _DEFAULT_STORE:
        before = utils._tracking_uri
        utils._tracking_uri = uri
        try:
            yield
        finally:
            utils._tracking_uri = before


def _pages(fetch: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yields the items of all pages; `fetch` takes a page's token, None for the first."""
    token: str | None = None
    while True:
        page = _retry(partial(fetch, token))
        yield from page
        token = page.token
        if not token:
            return


def _retry(action: Callable[[], T], what: str = "a request") -> T:
    """Calls an idempotent action and retries it for two minutes while MLflow is unreachable. Raises
    RefusedError at once if MLflow refuses `what` to this user."""
    from mlflow.exceptions import MlflowException

    deadline = time.monotonic() + _RETRY_SECONDS
    pause_seconds = 0.5
    while True:
        try:
            with explain_refusal(what):
                return action()
        except MlflowException as error:
            if error.error_code not in _TRANSIENT or time.monotonic() > deadline:
                raise
        time.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 2, 8.0)
