"""Mistakes of a user are errors of one line, with a hint."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from cli_runner import Call, Done

from jobs.cli import run, tessera


@pytest.fixture(scope="module")
def home(trained_home: Path) -> Path:
    """A home with one small registered model: `digits`, version 1, `challenger`."""
    return trained_home


def assert_error(done: Done, status: int, *parts: str) -> None:
    """An error is one line that describes the problem, and at most one more with a hint."""
    assert done.status == status, done
    assert not done.out
    lines = done.err.splitlines()
    assert 1 <= len(lines) <= 2, done.err
    assert lines[0].startswith("tessera: ")
    for part in parts:
        assert part in done.err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *((word, "evaluate") for word in ("test", "val", "validate")),
        *((word, "predict") for word in ("infer", "run")),
        *((word, "registry") for word in ("ls", "list", "models")),
        *((word, "doctor") for word in ("check", "checks")),
        *((word, "tune") for word in ("sweep", "hpo", "search")),
        *((word, "pack") for word in ("import", "convert")),
        ("delete", "registry MODEL/VERSION --delete"),
        ("resume", "train --resume RUN"),
        ("help", "--help"),
    ],
)
def test_a_synonym_of_a_verb_suggests_the_verb(typed: str, meant: str, call: Call) -> None:
    assert_error(call(typed), 2, f"unknown verb {typed!r}", f"did you mean: tessera {meant}?")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("trian", ["unknown verb 'trian'", "did you mean 'train'"]),
        ("--verison", ["No such option '--verison'", "--version"]),
        ("train --wrokers 1", ["No such option '--wrokers'", "--workers"]),
        ("train", ["nothing to train", "tessera families"]),
        ("train cnn", ["no data set", "--data DIR"]),
        ("train cnnn --data DIGITS", ["unknown family or recipe 'cnnn'", "did you mean 'cnn'"]),
        ("train cnn --variant tony --data DIGITS", ["unknown variant", "did you mean 'tiny'"]),
        ("train cnn resnet --data DIGITS", ["unexpected extra argument (resnet)"]),
        ("train cnn --data DIGITS --set optim.model.lt=1", ["did you mean 'optim.model.lr'"]),
        ("train cnn --data DIGITS --set model.chanels=1", ["did you mean 'model.channels'"]),
        ("train cnn --data DIGITS --set lr=1", ["unknown setting 'lr'", "mean 'optim.model.lr'"]),
        ("train cnn --data DIGITS --set batchsize=1", ["did you mean 'train.batch_size'"]),
        ("train cnn --data DIGITS --set weigth_decay=1", ["mean 'optim.model.weight_decay'"]),
        ("train cnn --data DIGITS --epochs 0", ["0 is not in the range x>=1"]),
        ("tune cnn --data DIGITS --search bayes", ["'bayes' is not one of", "'optuna'"]),
        ("tune cnn --data DIGITS --scheduler median", ["'median' is not one of"]),
        ("train cnn --data DIGITS --set optim.model.lr=fast", ["'fast'", "valid number"]),
        ("train cnn --data DIGITS --set train.epochs=1.5", ["train.epochs", "integer"]),
        ("train cnn --data DIGITS --set train.epochs=0", ["train.epochs = 0", "greater than"]),
        ("train cnn --data DIGITS --set model.kernel=2", ["model.kernel = 2", "odd"]),
        ("train cnn --data DIGITS --set lr", ["--set lr has no value", "PATH=VALUE"]),
        ("train cnn --data DIGITS --workers -1", ["workers.count = '-1': use a number", "2:8"]),
        ("train cnn --data DIGITS --workers two", ["workers.count = 'two': use a number"]),
        ("train cnn --data DIGITS --model a/b", ["'a/b' is not a valid name of a model"]),
        ("train none.yaml --data DIGITS", ["none.yaml can't be read"]),
        ("train SCRATCH/typo.yaml --data DIGITS", ["'optin'", "did you mean 'optim'"]),
        ("train SCRATCH/deep.yaml --data DIGITS", ["'train.epoch'", "did you mean 'train.epochs'"]),
        ("train SCRATCH/no.yaml --data DIGITS", ["is not valid YAML"]),
        ("train SCRATCH/empty.yaml --data DIGITS", ["write lines like: family: cnn"]),
        (
            "train cnn --resume x --data DIGITS",
            ["--resume takes the recipe", "excludes FAMILY|RECIPE"],
        ),
        ("train --resume x --dry-run --model m", ["excludes --model, --dry-run"]),
        ("tune cnn --resume x", ["--resume takes the recipe", "excludes FAMILY|RECIPE"]),
        ("tune --resume x --trials 20", ["excludes --trials", "start anew"]),
        ("tune --resume x --space space.yaml --search random", ["excludes --search, --space"]),
        ("tune --resume x --lr 0.1 --set train.epochs=3", ["excludes --lr, --set"]),
        ("train --resume nobody", ["unknown run 'nobody'", "known: cnn-digits-"]),
        ("evaluate digits --data DIGITS --split tset", ["'tset' is not one of"]),
        ("evaluate digits", ["Missing option '--data'"]),
        ("evaluate dogits --data DIGITS", ["unknown model 'dogits'", "did you mean 'digits'"]),
        ("rollback digits/one", ["'digits/one' does not name a model", "NAME@alias"]),
        ("registry digits --delete", ["--delete needs a version", "registry digits/1 --delete"]),
        ("promote dogits/1", ["unknown model 'dogits'", "did you mean 'digits'"]),
        ("predict models:/dogits@champion x.png", ["unknown model", "did you mean 'digits'"]),
        ("predict digits", ["nothing to predict", "--samples N"]),
    ],
)
def test_usage_errors_have_a_hint(
    words: str, parts: list[str], call: Call, home: Path, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "typo.yaml").write_text("family: cnn\noptin: {}\n")
    (tmp_path / "deep.yaml").write_text("family: cnn\ntrain: {epoch: 3}\n")
    (tmp_path / "no.yaml").write_text("family: [cnn\n")
    (tmp_path / "empty.yaml").write_text("")
    before = set((home / "runs").iterdir())
    line = words.replace("DIGITS", str(digits)).replace("SCRATCH", str(tmp_path))
    assert_error(call(*line.split()), 2, *parts)
    assert set((home / "runs").iterdir()) == before


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("train cnn --data SCRATCH", ["is not a packed data set", "tessera pack SOURCE --to"]),
        ("train cnn --data SCRATCH/none", ["is not a packed data set", "tessera pack SOURCE --to"]),
        ("inspect SCRATCH", ["is not a packed data set", "tessera pack SOURCE --to"]),
        ("evaluate digits --data SCRATCH", ["is not a packed data set"]),
        ("evaluate digits@champion --data DIGITS", ["'champion'", "aliases challenger"]),
        ("evaluate digits/7 --data DIGITS", ["'7'", "it has version 1"]),
        ("promote digits/7", ["'7'", "it has version 1"]),
        ("rollback dogits", ["has no champion"]),
        ("rollback digits", ["has no champion"]),
        ("predict models:/digits@champion x.png", ["'champion'", "aliases challenger"]),
        ("predict models:/digits/7 x.png", ["'7'", "it has version 1"]),
    ],
)
def test_errors_about_unknown_names_list_the_known_ones(
    words: str, parts: list[str], call: Call, home: Path, digits: Path, tmp_path: Path
) -> None:
    line = words.replace("DIGITS", str(digits)).replace("SCRATCH", str(tmp_path))
    assert_error(call(*line.split()), 1, *parts)


def test_a_version_without_evaluation_is_refused(call: Call, home: Path) -> None:
    done = call("promote", "digits/1")
    assert done.status == 1
    assert "version 1 of digits refused: " in done.out
    assert "tessera evaluate" in done.out
    assert "no version or alias 'champion'" in call("predict", "digits@champion", "x").err


@pytest.mark.parametrize(
    "words",
    [
        "train cnn --workers 0 --data DIGITS",
        "evaluate digits --data DIGITS",
        "promote digits/1",
        "rollback digits",
        "predict models:/digits@challenger x.png",
    ],
)
def test_an_unreachable_mlflow_is_reported_at_once(
    words: str, call: Call, home: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:  # bound, so that nobody else listens there
        held.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        before = set((home / "runs").iterdir())
        done = call(*words.replace("DIGITS", str(digits)).split())
    assert_error(done, 1, address, "refused", "tessera up", "MLFLOW_TRACKING_URI")
    assert set((home / "runs").iterdir()) == before, "a training that never began left its folder"


def test_verbose_shows_the_traceback(call: Call) -> None:
    from models.core.errors import UsageError

    with pytest.raises(UsageError, match="unknown family"):
        run(tessera, "tessera", ["train", "cnnn", "--verbose"])
