"""The user says where copies of remote shards lie, and the workers are told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runner import Call

from jobs.shared import cache_settings
from models.core.errors import UsageError
from pipelines.storage.base import (
    CacheSettings,
    cache_payload,
    current_cache,
    use_cache,
    use_cache_of,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TESSERA_CACHE", "TESSERA_CACHE_SIZE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    use_cache(None)
    yield
    use_cache(None)


DEFAULT = CacheSettings(Path.home() / ".cache" / "tessera" / "shards")


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
def test_the_environment_says_where(
    environment: dict[str, str], expected: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cache_settings.apply()
    assert current_cache() == expected
    payload = cache_payload()
    use_cache(None)
    use_cache_of(payload)
    assert current_cache() == expected, "as a worker is told"


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
def test_sizes_are_read(text: str, size: int) -> None:
    assert cache_settings.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "5 PB", "1GB2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        cache_settings.parse_size(text)


def test_a_wrong_size_is_a_line_and_no_traceback(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_CACHE_SIZE", "much")
    done = call("families")
    assert (done.status, done.out) == (2, "")
    assert "TESSERA_CACHE_SIZE=much is no size" in done.err
