"""The exit status of the command: the same few values for every verb."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest
from cli_runner import Call

from jobs.cli import EXIT_STATUSES, run, verbs
from models.core.errors import TesseraError, UsageError


def test_every_verb_has_the_same_status_for_help_and_for_wrong_usage(call: Call) -> None:
    wrong = {
        verb: statuses
        for verb in verbs()
        if (statuses := (call(verb, "--help").status, call(verb, "--no-such-option").status))
        != (0, 2)
    }
    assert not wrong


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (None, 0),
        (TesseraError("the disk is empty"), 1),
        (OSError(28, "No space left on device"), 1),
        (UsageError("no such setting"), 2),
        (click.UsageError("no such option"), 2),
        (click.Abort(), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_a_status_of_the_table(raised: BaseException | None, status: int) -> None:
    @click.command()
    def command() -> None:
        if raised is not None:
            raise raised

    with pytest.raises(SystemExit) as left:
        run(command, "x", [])
    assert left.value.code == status
    assert status in EXIT_STATUSES


def test_output_that_nobody_reads_is_no_error() -> None:
    """More than a pipe holds, so that writing fails while the verb still runs."""
    code = (
        "import click, sys\nfrom jobs.cli import run\n@click.command()\ndef command():\n"
        "    for _ in range(100_000): print('a line of output')\nrun(command, 'x', [])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
