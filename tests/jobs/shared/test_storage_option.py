"""The option that says where runs are kept, and the environment that says it otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.shared.storage_option import settings_with


def test_the_option_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))
    monkeypatch.setenv("TESSERA_STORAGE", "s3://bucket/environment")
    assert settings_with(None).remote_storage == "s3://bucket/environment"
    assert settings_with("s3://bucket/option").remote_storage == "s3://bucket/option"
    monkeypatch.delenv("TESSERA_STORAGE")
    assert settings_with(None).remote_storage == ""
    assert settings_with(str(tmp_path / "runs")).remote_storage == ""
