"""Options for settings of a recipe, and their short forms."""

from __future__ import annotations

from typing import Any

import click
import pytest

from jobs.shared.settings_options import (
    SettingsCommand,
    parse_option,
    refuse_with_resume,
    settings_options,
)
from models.core.errors import UsageError


def overrides(*words: str) -> tuple[str, ...]:
    @click.command(cls=SettingsCommand)
    @settings_options
    def command(**options: Any) -> tuple[str, ...]:
        assert options.keys() == {"overrides"}
        return tuple(options["overrides"])

    result: tuple[str, ...] = command.main(list(words), standalone_mode=False)
    return result


def test_short_forms_come_before_what_is_set_by_path() -> None:
    assert overrides("--set", "train.epochs=9", "--epochs", "3") == (
        "train.epochs=3",
        "train.epochs=9",
    )
    assert overrides("--image-size", "32", "--lr", "0.1") == (
        "optim.*.lr=0.1",
        "data.height=32",
        "data.width=32",
    )
    assert overrides() == ()


@pytest.mark.parametrize("words", [("--epochs", "0"), ("--lr", "fast"), ("--batch-size", "-1")])
def test_values_without_sense_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError) as caught:
        overrides(*words)
    assert words[0] in caught.value.format_message()


def test_resume_excludes_other_options() -> None:
    @click.command()
    @click.option("--resume")
    @click.option("--seed", type=int)
    @click.option("--verbose", is_flag=True)
    def command(**options: Any) -> None:
        refuse_with_resume("the settings of the run", ("verbose",))

    command.main(["--resume", "a", "--verbose"], standalone_mode=False)
    with pytest.raises(UsageError, match="takes the settings of the run, and excludes --seed"):
        command.main(["--resume", "a", "--seed", "1"], standalone_mode=False)


def test_an_option_of_a_format_has_a_name_and_a_value() -> None:
    assert parse_option("label=a=b") == ("label", "a=b")
    for text in ("label", "=a", ""):
        with pytest.raises(UsageError, match="NAME=VALUE"):
            parse_option(text)
