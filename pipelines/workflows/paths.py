"""Where the embedded MLflow and the folders of the runs live.

In: TESSERA_HOME, MLFLOW_TRACKING_URI and TESSERA_UI. Out: places. Creates nothing; must not load
MLflow.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.tracking import mlflow_runs


def root() -> Path:
    """TESSERA_HOME, or `.tessera` in the current folder; absolute."""
    return Path(os.environ.get("TESSERA_HOME") or ".tessera").expanduser().absolute()


def tracking_uri() -> str:
    """The user's MLflow (MLFLOW_TRACKING_URI), or the embedded one."""
    return os.environ.get("MLFLOW_TRACKING_URI") or mlflow_runs.embedded_uri(root())


def runs_dir() -> Path:
    """One folder for each training lies here."""
    return root() / "runs"


def ui_address() -> str:
    """Where the pages of the embedded MLflow are shown once `tessera up` runs."""
    return os.environ.get("TESSERA_UI") or mlflow_runs.DEFAULT_UI


def searches_dir() -> Path:
    """One folder for each search lies here."""
    return root() / "searches"
