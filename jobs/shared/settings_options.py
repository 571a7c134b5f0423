"""The options that change settings of a recipe: `--set`, and shortcuts of it for the common ones.

In: the command line of `train` or `tune`. Out: the parameter `overrides`, with the shortcuts as
texts of `--set` before the texts of `--set` itself, which therefore win.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click
from click.core import ParameterSource

from jobs.shared import completion
from models.core.errors import UsageError

SHORTCUTS = {
    "epochs": ("train.epochs",),
    "batch_size": ("train.batch_size",),
    "lr": ("optim.*.lr",),
    "image_size": ("data.height", "data.width"),
}
"""A shortcut's parameter -> the paths that it sets."""

F = TypeVar("F", bound=Callable[..., object])


class SettingsCommand(click.Command):
    """A command with `settings_options`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        shortcuts = [
            f"{path}={value}"
            for name, paths in SHORTCUTS.items()
            if (value := ctx.params.pop(name, None)) is not None
            for path in paths
        ]
        ctx.params["overrides"] = (*shortcuts, *(ctx.params.get("overrides") or ()))
        return rest


def refuse_with_resume(kept: str, allowed: tuple[str, ...]) -> None:
    """Raises UsageError if the command line has more than --resume and the `allowed` parameters:
    nothing that was asked for may be passed over. `kept` says what is taken from before."""
    context = click.get_current_context()
    given = [
        max(parameter.opts, key=len)
        if isinstance(parameter, click.Option)
        else parameter.human_readable_name
        for parameter in context.command.params
        if parameter.name not in ("resume", *allowed)
        and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(
            f"--resume takes {kept}, and excludes {', '.join(given)}",
            hint="leave it out, or start anew without --resume",
        )


def settings_options(function: F) -> F:
    """Adds the options; the function gets them all as `overrides`, texts of the form PATH=VALUE."""
    options = [
        click.option("--epochs", type=click.IntRange(1), help="Set train.epochs."),
        click.option("--batch-size", type=click.IntRange(1), help="Set train.batch_size."),
        click.option("--lr", type=float, help="Set optim.*.lr, of all parts of the network."),
        click.option(
            "--image-size",
            type=click.IntRange(1),
            metavar="PIXELS",
            help="Set data.height and data.width.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="PATH=VALUE",
            shell_complete=completion.settings,
            help="Change any setting of the recipe; repeatable.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def parse_option(text: str) -> tuple[str, str]:
    """NAME=VALUE of an `--option`. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(
            f"--option {text!r} is not of the form NAME=VALUE", hint="as in --option label=class"
        )
    return name, value
