"""ROOM: MLflow, the registry: versions, aliases, and the record of who was champion.

In: folders of model files. Out: `MlflowRegistry`. Versions are promoted by alias, never by stage,
and loading one executes nothing. Must not know what is in the files.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from models.core.errors import TesseraError, UsageError, unknown
from pipelines import tag_names
from pipelines.interfaces import Decision, Version
from pipelines.tracking.mlflow_runs import VIEW, connect, page_root

T = TypeVar("T")

RECORD = ".champions"
"""The end of the name of a registered model that is another's record."""

_NAME_LENGTH = 256
_PATIENCE_SECONDS = 120.0
_TRANSIENT = {"TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "BAD_REQUEST", "REQUEST_LIMIT_EXCEEDED"}
_DEFAULT_STORE = threading.Lock()


class MlflowRegistry:
    """`ports.Registry` over MLflow. `uri` and `ui` as for `tracking.open_run`."""

    def __init__(self, uri: str | None, *, ui: str | None = None) -> None:
        self._client = connect(uri)
        self._ui = ui

    def register(
        self, name: str, directory: Path, *, run_id: str, tags: Mapping[str, str], step: int = 0
    ) -> Version:
        """Stores the files of `directory` as a logged model of the run, and that as a new version.

        All or nothing: a version exists once its files are there.
        """
        from mlflow.entities import LoggedModelOutput

        check_name(name)
        if name.endswith(RECORD):
            raise UsageError(
                f"a model can't be called {name!r}: names that end so are records of champions",
                hint=f"call it {name.removesuffix(RECORD)!r}",
            )
        client = self._client
        with _told(f"run {run_id!r} isn't in MLflow", "give the run that the model comes from"):
            experiment_id = _insist(lambda: client.get_run(run_id)).info.experiment_id
        # A logged model's name takes less than a registered model's.
        label = "".join("-" if c in "/:.%\"'" else c for c in f"{name}-{step}")
        model_id = _insist(
            lambda: client.create_logged_model(
                experiment_id, label, source_run_id=run_id, tags=dict(tags)
            )
        ).model_id
        try:
            _insist(lambda: client.log_model_artifacts(model_id, str(directory)))
        except BaseException:
            client.finalize_logged_model(model_id, "FAILED")
            raise
        _insist(lambda: client.finalize_logged_model(model_id, "READY"))
        _insist(lambda: client.log_outputs(run_id, [LoggedModelOutput(model_id, step=step)]))
        number = _insist(lambda: self._add_version(name, model_id, run_id, tags))
        # The link from the logged model's page to the version's, as MLflow's own tools set it.
        link = json.dumps([{"name": name, "version": number}])
        _insist(lambda: client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link}))
        return self.version(name, number)

    def _add_version(self, name: str, model_id: str, run_id: str, tags: Mapping[str, str]) -> int:
        """The number of the version that this logged model is; made if it isn't there yet, as it
        is when an answer got lost."""
        from mlflow.exceptions import MlflowException

        source = f"models:/{model_id}"
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for row in self._rows(name):
            if row.source == source:
                return int(row.version)
        with _default_store(self._client.tracking_uri):
            made = self._client.create_model_version(
                name, source=source, run_id=run_id, tags=dict(tags), model_id=model_id
            )
        return int(made.version)

    def version(self, name: str, ref: str | int) -> Version:
        check_name(name)
        found = self.versions(name)
        if not found:
            known = self.names()
            if not known:
                raise TesseraError("no model is registered yet", hint="train one: tessera train")
            raise unknown("model", name, known)
        for version in found:
            if str(version.number) == str(ref) or str(ref) in version.aliases:
                return version
        aliases = sorted(alias for version in found for alias in version.aliases)
        raise TesseraError(
            f"model {name!r} has no version or alias {str(ref)!r}",
            hint=f"it has versions {', '.join(str(v.number) for v in found)} and "
            + (f"aliases {', '.join(aliases)}" if aliases else "no alias"),
        )

    def versions(self, name: str) -> list[Version]:
        from mlflow.exceptions import MlflowException

        check_name(name)
        try:
            aliases = dict(_insist(lambda: self._client.get_registered_model(name)).aliases)
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
            for row in self._rows(name)
        ]
        return sorted(versions, key=lambda version: version.number)

    def names(self) -> list[str]:
        models = _pages(lambda token: self._client.search_registered_models(page_token=token))
        return sorted(model.name for model in models if tag_names.RECORD_OF not in model.tags)

    def _rows(self, name: str) -> Iterator[Any]:
        """MLflow's own entries of a model's versions."""
        wanted = f"name = '{name}'"
        return _pages(lambda token: self._client.search_model_versions(wanted, page_token=token))

    def tag(self, version: Version, values: Mapping[str, str]) -> None:
        with _told(f"model {version.name!r} has no version {version.number}"):
            for key, value in values.items():
                self._set_tag(version.name, version.number, key, str(value))

    def _set_tag(self, name: str, number: int, key: str, value: str) -> None:
        _insist(lambda: self._client.set_model_version_tag(name, str(number), key, value))

    def alias(self, name: str, alias: str, number: int) -> None:
        """Moves `alias` to the version `number`."""
        from mlflow.exceptions import MlflowException

        try:
            # Of two that set an alias for the first time, the server lets one fail.
            _insist(lambda: self._client.set_registered_model_alias(name, alias, str(number)))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                self.version(name, number)  # says what there is instead
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise UsageError(
                f"{alias!r} can't be an alias",
                hint="use letters, digits, - and _, but not 'latest' nor 'v' with a number",
            ) from None

    def delete(self, version: Version) -> None:
        with _told(f"model {version.name!r} has no version {version.number}"):
            self._client.delete_model_version(version.name, str(version.number))

    def missing(self, version: Version) -> str:
        from mlflow.exceptions import MlflowException

        try:
            run = _insist(lambda: self._client.get_run(version.run_id))
            place = self._place(version)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return "its run isn't in MLflow"
        if run.info.lifecycle_stage == "deleted":
            return "its run was deleted"
        experiment = _insist(lambda: self._client.get_experiment(run.info.experiment_id))
        root = experiment.artifact_location.removeprefix("file://").rstrip("/")
        place = place.removeprefix("file://")
        if not place.startswith(f"{root}/") or ".." in place.split("/"):
            return f"its files lie in {place}, outside of the artifacts of its run's experiment"
        return ""

    def _place(self, version: Version) -> str:
        """Where its files are, as an address."""
        number = str(version.number)
        return str(
            _insist(lambda: self._client.get_model_version_download_uri(version.name, number))
        )

    def decide(self, name: str, decision: Decision) -> None:
        """The record is a registered model beside, whose versions are numbered by the server: each
        is the version that was to be champion."""
        from mlflow.exceptions import MlflowException

        with _told(f"model {name!r} has no version {decision.target}"):
            target = str(decision.target)
            run_id = _insist(lambda: self._client.get_model_version(name, target)).run_id
        record = f"{name}{RECORD}"
        known = f"name = '{record}'"
        if not _insist(lambda: self._client.search_model_versions(known, max_results=1)):
            try:
                self._client.create_registered_model(
                    record,
                    tags={tag_names.RECORD_OF: name},
                    description=f"Each version decides who is champion of {name}, in order.",
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        tags = {
            f"{tag_names.DECISION_PREFIX}{key}": str(value)
            for key, value in asdict(decision).items()
        }
        source = f"models:/{name}/{decision.target}"
        _insist(
            lambda: self._client.create_model_version(
                record, source=source, run_id=run_id, tags=tags
            )
        )

    def decisions(self, name: str) -> list[Decision]:
        found = []
        for row in self._rows(f"{name}{RECORD}"):
            said = {
                key.removeprefix(tag_names.DECISION_PREFIX): value
                for key, value in row.tags.items()
                if key.startswith(tag_names.DECISION_PREFIX)
            }
            try:
                found.append(
                    Decision(
                        number=int(row.version),
                        base=int(said["base"]),
                        target=int(said["target"]),
                        before=None if said["before"] == "None" else int(said["before"]),
                        kind=said["kind"],
                        token=said["token"],
                        done=said["done"] == "True",
                    )
                )
            except (KeyError, ValueError):  # somebody else's version: it decides nothing
                continue
        return sorted(found, key=lambda decision: decision.number)

    def done(self, name: str, decision: Decision) -> None:
        self._set_tag(
            f"{name}{RECORD}", decision.number, f"{tag_names.DECISION_PREFIX}done", "True"
        )

    def download(self, version: Version, to: Path) -> Path:
        """The version's files in `to`/NAME-NUMBER, a folder that must not be there yet. It appears
        when it is complete."""
        from mlflow.artifacts import download_artifacts

        target = to / f"{version.name}-{version.number}"
        if target.exists():
            raise TesseraError(
                f"{target} is already there", hint="remove it, or name another folder"
            )
        to.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=to, prefix=".download-") as scratch,
            _told(f"the files of model {version.name!r} version {version.number} are gone"),
        ):
            # By its place, as MLflow looks "models:/…" up in its default store.
            place = self._place(version)
            files = Path(scratch) / "files"
            files.mkdir()
            got = download_artifacts(
                artifact_uri=place, dst_path=str(files), tracking_uri=self._client.tracking_uri
            )
            os.replace(got, target)
        return target

    def link(self, version: Version) -> str:
        base = page_root(self._client.tracking_uri, self._ui)
        return f"{base}/#/models/{quote(version.name, safe='')}/versions/{version.number}?{VIEW}"


def check_name(name: str) -> None:
    """A UsageError for a name that MLflow, or a path, can't take."""
    if (
        not name.strip()
        or len(name) > _NAME_LENGTH
        or any(c in "/:'\"\\" or not c.isprintable() for c in name)
        or name in (".", "..")
    ):
        raise UsageError(
            f"a model can't be called {name!r}",
            hint=f"use letters, digits, spaces, - _ and ., at most {_NAME_LENGTH} characters",
        )


@contextmanager
def _told(message: str, hint: str = "") -> Iterator[None]:
    """MLflow's "there is no such thing" as an error for the user."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TesseraError(message, hint=hint) from error


@contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """Makes `uri` MLflow's default for one call: its SQL registry looks a logged model up in the
    default store, whichever store was asked (a TODO of its own). The public setter would also
    write the environment, and forget there what the user had set."""
    from mlflow.tracking._tracking_service import utils

    with _DEFAULT_STORE:
        before = utils._tracking_uri
        utils._tracking_uri = uri
        try:
            yield
        finally:
            utils._tracking_uri = before


def _pages(fetch: Callable[[str | None], Any]) -> Iterator[Any]:
    """What all pages have; `fetch` gets a page by its token, the first by None."""
    token: str | None = None
    while True:
        page = _insist(partial(fetch, token))
        yield from page
        token = page.token
        if not token:
            return


def _insist(action: Callable[[], T]) -> T:
    """Does what may be done twice, again and again while MLflow is away for a while."""
    from mlflow.exceptions import MlflowException

    deadline = time.monotonic() + _PATIENCE_SECONDS
    pause_seconds = 0.5
    while True:
        try:
            return action()
        except MlflowException as error:
            if error.error_code not in _TRANSIENT or time.monotonic() > deadline:
                raise
        time.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 2, 8.0)
