"""A training that its data can't feed is refused when it is submitted, and nothing starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_runner import Call


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a cluster."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def packed(digits: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits, tmp_path / "digits")
    return tmp_path / "digits"


REFUSED = [
    (["--workers", "3000"], "a batch of 128 can't be split over 3000 workers"),
    (
        ["--workers", "3000", "--set", "train.batch_size=3000"],
        "1439 train samples are not enough for 3000 workers",
    ),
    (["--set", "data.digest=" + "a" * 64], "the recipe has aaaaaaaaaaaa"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
@pytest.mark.parametrize("verb", [("submit", "train"), ("train",)])
def test_an_unfeedable_training_is_refused_with_the_reason(
    verb: tuple[str, ...], options: list[str], message: str, packed: Path, home: Path, call: Call
) -> None:
    refused = call(*verb, "cnn", "--data", packed, *options)
    assert refused.status in (1, 2)
    assert message in refused.err
    assert "cluster" not in refused.err
    assert not home.exists()


@pytest.mark.parametrize("verb", [("submit", "train"), ("train",), ("train", "--dry-run")])
@pytest.mark.parametrize("name", ["train/000000.tar", "val/000000.tar", "train/index.npy"])
def test_a_missing_file_is_reported(
    verb: tuple[str, ...], name: str, packed: Path, home: Path, call: Call
) -> None:
    (packed / name).unlink()
    refused = call(*verb, "cnn", "--data", packed)
    assert refused.status == 1
    assert f"{name}" in refused.err
    assert "is missing" in refused.err
    assert not home.exists()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["PACKED", "/only/on/the/cluster", "s3://bucket/set"])
def test_feedable_or_unreachable_data_are_submitted(
    data: str, packed: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    given = packed if data == "PACKED" else data
    refused = call("submit", "train", "cnn", "--data", given, "--workers", 2)
    assert refused.status == 1
    assert "no Ray cluster to submit to" in refused.err
