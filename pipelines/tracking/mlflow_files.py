"""ROOM: MLflow, the files of a model: downloaded, or refused in one line and within seconds.

In: the address of a folder in MLflow's store. Out: the folder. MLflow is imported when a function
runs, never with this module. Must not know runs, models or the registry.
"""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

from models.core.errors import TesseraError

_CONNECT_SECONDS = 10.0


def download(location: str, to: Path, uri: str, what: str) -> Path:
    """Downloads the folder at `location` below `to`; returns its path.

    `what` it is, for the message. Raises TesseraError, in one line, if that fails. A server that
    doesn't answer is given up after MLFLOW_HTTP_REQUEST_TIMEOUT, 10 s as Tessera sets it.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        _check_direct_access(location, uri)
        return Path(download_artifacts(artifact_uri=location, dst_path=str(to), tracking_uri=uri))
    except (MlflowException, RequestException) as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TesseraError(
            f"{what} can't be downloaded: {' '.join(str(error).split())[:300]}",
            hint="check that MLflow's server and the store of its files are up",
        ) from error


def _check_direct_access(location: str, uri: str) -> None:
    """Raises TesseraError within seconds if the user wants files straight from the server's object
    store, and its address can't be reached from here: MLflow itself would try for minutes."""
    from mlflow.environment_variables import MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    if not MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD.get():
        return
    repository = get_artifact_repository(location, tracking_uri=uri)
    if not isinstance(repository, MlflowArtifactsRepository):
        return
    for entry in repository.list_artifacts():
        if not entry.is_dir:
            parts = urlsplit(repository._get_presigned_download_url(entry.path).url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            try:
                socket.create_connection((parts.hostname or "", port), _CONNECT_SECONDS).close()
            except OSError as error:
                raise TesseraError(
                    f"MLflow's object store {parts.scheme}://{parts.netloc} can't be reached from "
                    f"here: {error.strerror or error}",
                    hint="unset MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD: then files go through "
                    "MLflow's server",
                ) from error
            return
