"""`tessera tune`: what is refused before anything starts. Searches are in `tests/integration`."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import tune
from models.core.errors import UsageError


def space_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


def test_pbt_with_settings_that_cannot_change_is_refused_and_creates_nothing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default space of the family has such settings: each is listed before anything starts."""
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "home"))
    arguments = ["cnn", "--data", str(digits), "--scheduler", "pbt", "--set", "train.epochs=4"]
    with pytest.raises(UsageError, match=r"train\.batch_size .*; model\.convs changes"):
        tune.command.main(arguments, standalone_mode=False)
    space = space_file(tmp_path, "optim.model.lr: {log_uniform: [1e-4, 1]}")
    for more, message in (
        ("--trials=1", "PBT needs at least 2 trials"),
        ("--interval=4", "single generation"),
    ):
        with pytest.raises(UsageError, match=message):
            tune.command.main([*arguments, "--space", str(space), more], standalone_mode=False)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "0s"], "--budget 0s"),
        (["--budget", ""], "--budget"),
        (["--search", "grid", "--trials", "3"], "excludes --trials"),
        (["--grace", "3"], "--grace 3 is more than the 2 epochs"),
        (["--interval", "1"], "--interval has no effect"),
        (["--scheduler", "asha", "--set", "train.epochs=1"], "asha stops trials after epochs"),
    ],
)
def test_settings_without_sense_are_refused_before_anything_starts(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "home"))
    arguments = ["cnn", "--data", str(digits), "--set", "train.epochs=2", *more]
    with pytest.raises(UsageError, match=message):
        tune.command.main(arguments, standalone_mode=False)
    assert not (tmp_path / "home").exists()
