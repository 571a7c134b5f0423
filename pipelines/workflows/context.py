"""Settings of a process: where runs are stored, and which MLflow, Ray and cache are used.

In: the environment, read once. Out: a frozen `Context` that is passed to every workflow. Creates
nothing on disk, and must not load MLflow or Ray.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from models.core.errors import UsageError
from pipelines.storage.base import (
    WEB_SCHEMES,
    CacheSettings,
    absolute_location,
    file_path,
    split_location,
)
from pipelines.tracking import mlflow_store


@dataclass(frozen=True)
class Context:
    """The settings that every workflow needs.

    Args:
        home: Absolute folder of reports and the embedded MLflow store, and of runs and searches
            unless `storage` is another folder.
        tracking_uri: Address of MLflow; the embedded store in `home` by default.
        ray_address: Address of a running Ray cluster, or None to start one when it is needed.
        cache: Folder for copies of remote shards, and the bytes that they may take in total.
        public_url: Address at which a browser reaches MLflow's pages, for links; None if that is
            `tracking_uri`, or where `tessera up` serves the embedded store.
        storage: Where all files of runs and searches are kept: a folder that all machines of the
            cluster see, or an address such as s3://BUCKET/FOLDER. With an address, the folders in
            `home` are only working copies. None is `home`.
    """

    home: Path
    tracking_uri: str
    ray_address: str | None
    cache: CacheSettings
    public_url: str | None = None
    storage: str | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Context:
        """Reads TESSERA_HOME, MLFLOW_TRACKING_URI, RAY_ADDRESS, TESSERA_CACHE,
        TESSERA_CACHE_SIZE, XDG_CACHE_HOME, MLFLOW_PUBLIC_URL and TESSERA_STORAGE; an empty variable
        counts as unset.

        Raises UsageError if TESSERA_CACHE_SIZE is not a valid size, or TESSERA_STORAGE not a
        location that can be written.
        """
        home = Path(environ.get("TESSERA_HOME") or ".tessera").expanduser().absolute()
        return cls(
            home=home,
            tracking_uri=environ.get("MLFLOW_TRACKING_URI") or mlflow_store.embedded_uri(home),
            ray_address=environ.get("RAY_ADDRESS") or None,
            cache=_cache_settings(environ),
            public_url=environ.get("MLFLOW_PUBLIC_URL") or None,
        ).with_storage(environ.get("TESSERA_STORAGE") or None)

    def with_storage(self, storage: str | None) -> Context:
        """The same settings with another storage; None changes nothing. Raises UsageError if it is
        not a location that can be written."""
        if storage is None:
            return self
        location = absolute_location(storage)
        scheme, rest = split_location(location)
        if scheme in WEB_SCHEMES:
            raise UsageError(
                f"{storage} can't be the storage of runs: a web server can't be written",
                hint="use a folder or an address such as s3://BUCKET/FOLDER",
            )
        if scheme == "file":
            location = str(file_path(location, rest))
        return replace(self, storage=location)

    @property
    def remote_storage(self) -> str:
        """The address of an object store, without a slash at its end; empty if runs are kept in a
        folder."""
        is_address = self.storage is not None and bool(split_location(self.storage)[0])
        return (self.storage or "").rstrip("/") if is_address else ""

    @property
    def _folder(self) -> Path:
        return self.home if self.storage is None or self.remote_storage else Path(self.storage)

    @property
    def runs_dir(self) -> Path:
        """The folder with one subfolder per training."""
        return self._folder / "runs"

    @property
    def searches_dir(self) -> Path:
        """The folder with one subfolder per search."""
        return self._folder / "searches"

    @property
    def reports_dir(self) -> Path:
        """The folder with one subfolder per evaluation report."""
        return self.home / "reports"

    @property
    def is_embedded(self) -> bool:
        """Whether MLflow is the embedded store in `home`."""
        return self.tracking_uri == mlflow_store.embedded_uri(self.home)


def _cache_settings(environ: Mapping[str, str]) -> CacheSettings:
    settings = CacheSettings.default()
    if folder := environ.get("TESSERA_CACHE"):
        settings = replace(settings, folder=Path(folder).expanduser().absolute())
    elif caches := environ.get("XDG_CACHE_HOME"):
        settings = replace(settings, folder=Path(caches).absolute() / "tessera" / "shards")
    if size := environ.get("TESSERA_CACHE_SIZE"):
        settings = replace(settings, limit_bytes=parse_size(size))
    return settings


def parse_size(text: str) -> int:
    """Bytes from a number with KB, MB, GB, TB, the same with i (KiB), or without a unit.

    Raises UsageError if `text` is not a valid size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(I?)B?", text.strip().upper())
    if not match:
        raise UsageError(f"TESSERA_CACHE_SIZE={text} is not a valid size", hint="as in 200GB")
    base, power = 1024 if match[3] else 1000, " KMGT".index(match[2] or " ")
    return int(float(match[1]) * base**power)
