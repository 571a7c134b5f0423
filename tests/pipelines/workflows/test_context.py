"""Settings are read from the environment once, and passed to the workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runner import Call

from models.core.errors import UsageError
from pipelines.storage.base import (
    CacheSettings,
    cache_payload,
    current_cache,
    use_cache,
    use_cache_of,
)
from pipelines.workflows import services
from pipelines.workflows.context import Context, parse_size


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TESSERA_CACHE", "TESSERA_CACHE_SIZE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    use_cache(None)
    yield
    use_cache(None)


DEFAULT = CacheSettings.default()


def test_the_defaults_are_embedded_services_in_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    context = Context.from_environment({})
    assert context.home == tmp_path / ".tessera"
    assert context.tracking_uri == f"sqlite:///{tmp_path}/.tessera/mlflow.db"
    assert context.is_embedded
    assert context.ray_address is None
    assert context.cache == DEFAULT
    assert os.listdir(tmp_path) == [], "reading the settings creates nothing"


def test_each_setting_is_read_from_its_variable(tmp_path: Path) -> None:
    context = Context.from_environment(
        {
            "TESSERA_HOME": str(tmp_path),
            "MLFLOW_TRACKING_URI": "http://tracking:5000",
            "RAY_ADDRESS": "head:6379",
            "MLFLOW_PUBLIC_URL": "http://pages:80",
        }
    )
    assert (context.runs_dir, context.searches_dir) == (tmp_path / "runs", tmp_path / "searches")
    assert context.tracking_uri == "http://tracking:5000"
    assert not context.is_embedded
    assert (context.ray_address, context.public_url) == ("head:6379", "http://pages:80")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, DEFAULT),
        ({"TESSERA_CACHE": ""}, DEFAULT),
        ({"TESSERA_CACHE": "/fast"}, CacheSettings(Path("/fast"))),
        ({"XDG_CACHE_HOME": "/x"}, CacheSettings(Path("/x/tessera/shards"))),
        ({"XDG_CACHE_HOME": "/x", "TESSERA_CACHE": "/fast"}, CacheSettings(Path("/fast"))),
        ({"TESSERA_CACHE_SIZE": "2GB"}, CacheSettings(DEFAULT.folder, 2_000_000_000)),
    ],
)
def test_the_cache_reaches_the_workers(
    environment: dict[str, str], expected: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context.from_environment(environment)
    assert context.cache == expected
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what follows sets variables
    services.apply_settings(context)
    assert current_cache() == expected
    payload = cache_payload()
    assert bool(payload) == (expected != DEFAULT), "the default is each machine's own"
    use_cache(None)
    use_cache_of(payload)
    assert current_cache() == expected, "in a worker"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("1.5 kb", 1500),
        ("200GB", 200 * 10**9),
        ("3TiB", 3 * 2**40),
        ("8 KiB", 8192),
    ],
)
def test_sizes_with_units_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "5 PB", "1GB2"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid size"):
        parse_size(text)


def test_an_invalid_size_is_reported_in_one_line_without_a_traceback(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_CACHE_SIZE", "much")
    done = call("families")
    assert (done.status, done.out) == (2, "")
    assert "TESSERA_CACHE_SIZE=much is not a valid size" in done.err


def test_runs_are_kept_in_the_home_folder_in_another_folder_or_at_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = {"TESSERA_HOME": str(tmp_path / "home")}
    plain = Context.from_environment(home)
    assert (plain.runs_dir, plain.remote_storage) == (tmp_path / "home" / "runs", "")
    for where in ("shared", f"file://{tmp_path}/shared"):
        folder = Context.from_environment({**home, "TESSERA_STORAGE": where})
        assert (folder.runs_dir, folder.remote_storage) == (tmp_path / "shared" / "runs", "")
        assert folder.searches_dir == tmp_path / "shared" / "searches"
    remote = plain.with_storage("s3://bucket/tessera/")
    assert remote.remote_storage == "s3://bucket/tessera"
    assert remote.runs_dir == plain.runs_dir, "a working copy"
    assert remote.with_storage(None) == remote


def test_a_storage_that_cant_be_written_is_refused() -> None:
    with pytest.raises(UsageError, match="a web server can't be written"):
        Context.from_environment({"TESSERA_STORAGE": "https://host/runs"})
    with pytest.raises(UsageError, match="has a scheme that is not supported"):
        Context.from_environment({"TESSERA_STORAGE": "pipe:ls"})
