"""The page about searches: its trials are processes of Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import Shell, commands

pytestmark = pytest.mark.e2e

PAGE = Path(__file__).parents[2] / "docs" / "search.md"


@pytest.mark.slow
def test_every_command_of_the_page_on_searches_runs(ray_cluster: None, shell: Shell) -> None:
    for command in commands(PAGE):
        shell(command)
