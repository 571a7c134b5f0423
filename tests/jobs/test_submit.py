"""What can't be submitted, such as a training that its data can't feed, is refused, and nothing
starts. What a job gets: absolute paths, and variables without secrets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_runner import Call

from jobs import submit


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


@pytest.mark.parametrize(
    ("arguments", "more", "status", "message"),
    [
        (["families"], {}, 1, "no Ray cluster to submit to"),
        (
            ["families"],
            {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"},
            1,
            "nothing listens there",
        ),
        (["families"], {"RAY_ADDRESS": "10.1.2.3:6379"}, 2, "RAY_API_SERVER_ADDRESS"),
        (["trian"], {}, 2, "did you mean 'train'"),
        (["up"], {}, 2, "can't be submitted"),
        (["families", "--jsno"], {}, 2, "--json"),
        ([], {}, 2, "VERB"),
    ],
)
def test_invalid_submissions_are_refused(
    arguments: list[str],
    more: dict[str, str],
    status: int,
    message: str,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    refused = call("submit", *arguments)
    assert refused.status == status
    assert message in refused.err


def test_only_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cnn").mkdir()  # a folder that is called like a family
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "recipe.yaml").touch()
    settle = submit.settle_paths
    assert settle("train", ("cnn", "--set", "optim.model.lr=0.3")) == [
        "cnn",
        "--set",
        "optim.model.lr=0.3",
    ]
    assert settle("train", ("sub/recipe.yaml", "--data", "new")) == [
        str(tmp_path / "sub" / "recipe.yaml"),
        "--data",
        str(tmp_path / "new"),
    ]
    assert settle("train", ("cnn", "--data=new")) == ["cnn", f"--data={tmp_path / 'new'}"]
    assert settle("train", ("cnn", "--data", "/far/away")) == ["cnn", "--data", "/far/away"]


def test_the_environment_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))
    secrets = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")
    for name in secrets:
        monkeypatch.setenv(name, "s3cr3t")
    monkeypatch.setenv("MLFLOW_PUBLIC_URL", "https://pages")
    for uri, local, sent in (
        ("sqlite:///mlflow.db", True, False),
        ("http://127.0.0.1:5000", True, True),
        ("http://127.0.0.1:5000", False, False),
        ("https://mlflow.example.com", False, True),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        job = submit.environment_for_job(local)
        assert job.get("MLFLOW_TRACKING_URI") == (uri if sent else None)
        assert job["MLFLOW_PUBLIC_URL"] == "https://pages"
        assert ("TESSERA_HOME" in job) == local
        assert "s3cr3t" not in str(job), "Ray shows a job's variables"
        assert all(name in submit.unsent_secrets(False) for name in secrets)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://trainer:s3cr3t@mlflow.example.com/x")
    job = submit.environment_for_job(local=False)
    assert job["MLFLOW_TRACKING_URI"] == "https://mlflow.example.com/x"
    assert "the password in MLFLOW_TRACKING_URI" in submit.unsent_secrets(False)
    for name in (*secrets, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name)
    assert submit.unsent_secrets(False) == ""
