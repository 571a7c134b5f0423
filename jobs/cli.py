"""The `tessera` command. Every other module of this folder is a verb.

In: argv. Out: the exit status, one of `EXIT_STATUSES`. A verb's module has a
click command called `command`. The list of verbs is read from the files without importing them, and
a verb imports its heavy libraries only when it runs, so help and shell completion are immediate.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.metadata
import os
import pkgutil
import re
import sys
from pathlib import Path
from typing import NoReturn

import click

import jobs
from models.core.errors import TesseraError, UsageError, hide_passwords, unknown

GROUPS = {"data": "Data", "training": "Training", "models": "Models", "services": "Services"}
"""`GROUP` in a verb's module -> the heading above it in `tessera --help`, in this order."""

SYNONYMS = {
    "evaluate": "test val validate validation eval score assess benchmark report metrics",
    "predict": "infer inference run classify detect segment generate sample label ask",
    "registry": "ls list models versions show",
    "registry MODEL/VERSION --delete": "delete remove rm",
    "doctor": "check checks diagnose health env",
    "tune": "sweep hpo search optimize optimise hyperparameters",
    "fix": "correct relabel clean edit",
    "pack": "import convert prepare ingest shard shards dataset create",
    "inspect": "info data stats summary view card",
    "verify": "checksum checksums fsck validate-data",
    "families": "architectures networks zoo",
    "families --recipes": "recipes",
    "formats": "importers readers",
    "describe": "settings options config parameters explain",
    "train": "fit learn start finetune fine-tune",
    "train --resume RUN": "resume continue restart",
    "promote": "deploy release publish approve champion",
    "rollback": "revert undo demote",
    "lineage": "provenance history trace origin",
    "reproduce": "replay rerun repeat retrain",
    "export": "onnx save pt2",
    "up": "serve server launch ui",
    "down": "stop shutdown kill",
    "status": "ps services",
    "submit": "job remote",
    "demo": "quickstart tutorial example",
    "--help": "help",
    "--version": "version",
}
"""A verb -> words that other tools use for it. Typing one of these words gives a hint."""


EXIT_STATUSES = {
    0: "Done. Also if the reader of the output closed it, as `head` does.",
    1: "Failed or refused: an error, a refused promotion, a difference that `verify` found, "
    "a check of `doctor` that failed.",
    2: "Wrong usage: an unknown verb, option or setting, or a missing argument. Nothing was begun.",
    130: "Stopped with Ctrl-C. What can be resumed is named on stderr.",
}
"""Exit status of every verb -> what it means. A process that a signal ended has 128 + its number;
`submit` returns the status of the verb that it ran on the cluster."""


def verbs() -> list[str]:
    """All verbs, in alphabetical order."""
    modules = (module.name for module in pkgutil.iter_modules(jobs.__path__) if not module.ispkg)
    return sorted(name for name in modules if f"jobs.{name}" != __name__)


def listed(verb: str) -> tuple[str, str]:
    """A verb's group and its line of help, read from the source: importing every verb to print a
    list of them would take seconds."""
    source = (Path(__file__).with_name(f"{verb}.py")).read_text(encoding="utf-8")
    group = re.search(r'^GROUP = "(\w+)"', source, re.MULTILINE)
    line = re.search(r'\bshort_help="([^"]+)"', source)
    return group[1] if group else "", line[1] if line else ""


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
            raise unknown_verb(args[0], verbs())
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in GROUPS.values()}
        for verb in verbs():
            group, line = listed(verb)
            rows.setdefault(GROUPS.get(group, "More"), []).append((verb, line))
        width = max(map(len, verbs()))
        for heading, lines in rows.items():
            if lines:
                with formatter.section(heading):
                    formatter.write_dl([(verb.ljust(width), line) for verb, line in lines])

    def shell_complete(
        self, ctx: click.Context, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            click.shell_completion.CompletionItem(verb, help=listed(verb)[1])
            for verb in verbs()
            if verb.startswith(incomplete)
        ]


def unknown_verb(given: str, allowed: list[str]) -> UsageError:
    """The error for an unknown verb, with a hint at the verb that was probably meant."""
    words = given.lower().replace("_", "-")
    for instead, names in SYNONYMS.items():
        if words in names.split():
            return UsageError(f"unknown verb {given!r}", hint=f"did you mean: tessera {instead}?")
    return unknown("verb", given, allowed, see="tessera --help")


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="VERB [ARGUMENTS]...",
)
@click.version_option(
    importlib.metadata.version("tessera-train"),
    prog_name="tessera",
    help="Show the version and exit.",
)
@click.help_option("-h", "--help", help="Show this message and exit.")
def tessera() -> None:
    """Train image recognition models: from a folder of images to a promoted model.

    Help for a verb: tessera VERB --help. Shell completion: eval
    "$(_TESSERA_COMPLETE=bash_source tessera)", or zsh_source, fish_source.
    """


def run(command: click.Command, name: str, argv: list[str] | None = None) -> NoReturn:
    """Runs a command and exits; a user's mistake is a line or two on stderr, never a traceback."""
    if argv is None:
        argv = sys.argv[1:]
        atexit.register(_exit_without_cleanup)  # before Ray is loaded, so it runs after Ray's own
    # torch reads it when it is loaded: a waiting thread then leaves its CPU to others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.umask(os.umask(0o077) | 0o002)  # no other user may change what is written
    verbose, stdout = "--verbose" in argv, sys.stdout
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
    except SystemExit:
        if sys.stdout is stdout:
            raise
        _leave(0)  # the reader of the output has closed it, and click has replaced it
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
    print(f"tessera: {hide_passwords(message)}", file=sys.stderr)
    if hint:
        print(f"         {hide_passwords(hint)}", file=sys.stderr)


def _leave(status: int) -> NoReturn:
    """Exits. A pipe that was closed by its reader (`| head`) is not an error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _ending[0] = status
    raise SystemExit(status)


_ending = [1]
"""Exit status of the process; 1 after an exception that wasn't caught."""


def _exit_without_cleanup() -> None:
    """Skips the destructors of C++ libraries. In one of them, in a thread that isn't Python's, a
    training that had succeeded and registered its model died of SIGSEGV."""
    if "ray" in sys.modules:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_ending[0])


def main() -> NoReturn:
    run(tessera, "tessera")
