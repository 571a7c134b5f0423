"""Names of runs, and calls that are repeated with other settings."""

from __future__ import annotations

import unicodedata

import pytest

from models.core.errors import UsageError
from pipelines.workflows import named_runs


@pytest.mark.parametrize("name", ["a", "night run", "Größe 3", "it's", "x" * 180])
def test_a_name_of_a_folder_is_a_name_of_a_run(name: str) -> None:
    assert named_runs.check_name(name) == unicodedata.normalize("NFC", name)


def test_two_forms_of_a_letter_are_one_name() -> None:
    assert named_runs.check_name("u\u0308") == named_runs.check_name("\u00fc") == "\u00fc"


@pytest.mark.parametrize(
    "name",
    ["", " a", "a ", ".a", "-a", "a/b", "a\\b", "a\nb", "'\"", "x" * 181, "ü" * 91, "\ud800"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not a valid name of a run"):
        named_runs.check_name(name)


def test_changes_are_listed() -> None:
    named_runs.refuse_changes("a", [])
    with pytest.raises(UsageError, match="a was begun with other settings: x was 1, is 2; y"):
        named_runs.refuse_changes("a", ["x was 1, is 2", "y was 3, is 4"])
