"""The option `--storage`: where the files of runs are kept.

In: the command line of a verb that trains. Out: the parameter `storage`, for `settings_with`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from pipelines.workflows.context import Context

F = TypeVar("F", bound=Callable[..., object])


def storage_option(function: F) -> F:
    """Adds the option; the function gets the text, or None."""
    return click.option(
        "--storage",
        metavar="DIR",
        help="Where runs are kept: a folder that all machines see, or an address such as "
        "s3://BUCKET/FOLDER; by default TESSERA_STORAGE, or TESSERA_HOME.",
    )(function)


def settings_with(storage: str | None) -> Context:
    """The settings of the environment, with the option's storage if it was given."""
    from pipelines.workflows.context import Context

    return Context.from_environment().with_storage(storage)
