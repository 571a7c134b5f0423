"""The `tessera` command. Each verb is a file of this folder with a click command in `command`.

In: argv. Out: the exit status: 0 done, 1 refused or failed, 2 wrong usage. A verb is imported only
when it is asked for, and imports its heavy libraries only when it runs, so that help and shell
completion are immediate.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.metadata
import os
import pkgutil
import sys
from typing import NoReturn

import click

import jobs
from models.core.errors import TesseraError

NO_VERBS = {
    "cli",
    "terminal",
    "embedded",
    "progress",
    "driver",
    "services",
    "data_cache",
    "judges",
    "answers",
    "searching",
    "examining",
    "copying",
    "trials",
    "generations",
    "whole",
}
"""Files of this folder that are no verbs: what the verbs share."""


def verbs() -> list[str]:
    found = (m.name for m in pkgutil.iter_modules(jobs.__path__) if not m.ispkg)
    return sorted(name for name in found if name not in NO_VERBS)


class _Verbs(click.Group):
    """Loads a verb's module when the verb is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return verbs()

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in verbs():
            return None
        command: click.Command = importlib.import_module(f"jobs.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in verbs() and not args[0].startswith("-"):
            from models.core.errors import unknown

            raise unknown("verb", args[0], verbs())
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("tessera-train"), prog_name="tessera")
def tessera() -> None:
    """From a folder of images to a promoted model: pack, train, evaluate, promote, predict.

    Shell completion: eval "$(_TESSERA_COMPLETE=bash_source tessera)", or zsh_source, fish_source.
    """


def run(command: click.Command, name: str, argv: list[str] | None = None) -> NoReturn:
    """Runs a command and exits; a user's mistake is a line or two on stderr, never a traceback."""
    if argv is None:
        argv = sys.argv[1:]
        atexit.register(_end_at_once)  # before Ray is loaded: it runs after Ray's own
    # Read when torch is loaded: threads that wait let others work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    verbose = "--verbose" in argv
    try:
        from pipelines.storage.base import use_cache
        from pipelines.workflows.context import Context

        use_cache(Context.from_environment().cache)
        status = command.main(args=argv, prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        _leave(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        _complain(
            error.format_message(),
            hint=f"see: {context.command_path} --help" if context else "",
        )
        _leave(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        _leave(130)
    except TesseraError as error:
        if verbose:
            raise
        _complain(error.message, hint=error.hint)
        _leave(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        if verbose:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}", hint="--verbose shows where it happened")
        _leave(1)
    _leave(status if isinstance(status, int) else 0)


def _complain(message: str, hint: str = "") -> None:
    print(f"tessera: {message}", file=sys.stderr)
    if hint:
        print(f"         {hint}", file=sys.stderr)


def _leave(status: int) -> NoReturn:
    """A closed pipe on the other side (`| head`) is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _ending[0] = status
    raise SystemExit(status)


_ending = [1]
"""The status that the process ends with; 1 for what nobody caught."""


def _end_at_once() -> None:
    """Without destroying what C++ libraries hold: a training that had ended well, its model
    registered, was seen to die of SIGSEGV there, in a thread that isn't Python's."""
    if "ray" in sys.modules:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_ending[0])


def main() -> NoReturn:
    run(tessera, "tessera")
