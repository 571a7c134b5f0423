"""Which format a source has.

In: a source, and the format and options that the user gives. Out: the importer and its options.
Must not know how a format is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from models.core.errors import TesseraError, UsageError, unknown
from pipelines.data import importers
from pipelines.data.sources import IMAGE_SUFFIXES, TABLES, Importer, find_files, find_images


class Format(NamedTuple):
    """The importer of a source. `why` says, for the user, how it was chosen."""

    name: str
    importer: Importer
    options: dict[str, str]
    why: str


def choose(source: str, format: str | None, options: Mapping[str, str]) -> Format:
    """The format of `source`: the one that is given, or the only one that recognises it.

    `format` is NAME, `torchvision:CLASS`, or for an importer from outside MODULE or
    MODULE:ATTRIBUTE. Raises UsageError for an unknown format or option.
    """
    name, word, why = format or "", "", "given by --format"
    if not format:
        name, why = recognise(source)
    elif ":" in format and format.partition(":")[0] in importers.names():
        name, _, word = format.partition(":")  # the word is short for the option `name`
    importer = importers.get(name)
    given = {**options, **({"name": word} if word else {})}
    for option in given:
        if option not in importer.OPTIONS:
            if not importer.OPTIONS:
                raise UsageError(f"{name} takes no options", hint=f"leave {option!r} out")
            raise unknown(f"option of {name}", option, importer.OPTIONS)
    return Format(name, importer, given, why)


def recognise(source: str) -> tuple[str, str]:
    """(format, why) of a source. Raises TesseraError where no format or several recognise it."""
    fitting, refused = {}, []
    for name in importers.names():
        try:
            why = importers.get(name).recognises(source)
        except TesseraError as error:  # the source has this format, and is damaged
            refused.append(error)
            continue
        if why:
            fitting[name] = why
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    if fitting:
        listed = "; ".join(f"{name} ({why})" for name, why in fitting.items())
        raise UsageError(f"{source} could be {listed}", hint="choose one: --format NAME")
    if refused:
        raise refused[0]
    raise _unrecognised(source)


def _unrecognised(source: str) -> TesseraError:
    folder = Path(source)
    if not folder.exists():
        bundled = ", ".join(n for n in importers.names() if importers.get(n).recognises(n))
        return UsageError(
            f"{source} doesn't exist",
            hint=f"give a folder, or the name of a bundled data set: {bundled}",
        )
    if not folder.is_dir():
        if folder.suffix.lower() in TABLES:
            return UsageError(
                f"{source} is not a table of images and labels",
                hint="to see what is wrong with it: --format csv",
            )
        return UsageError(
            f"{source} is a file", hint="give the folder with the images; unpack an archive first"
        )
    if next(find_images(folder), None) is None:
        return TesseraError(f"{source} has no images", hint=image_names_hint())
    tables = [path for path in find_files(folder) if path.lower().endswith(TABLES)]
    if tables:
        return TesseraError(
            f"{source} has images and {tables[0]}, which is not recognised as a table of labels",
            hint="if it has the labels: --format csv with --option label_column=NAME or "
            "delimiter=CHARACTER; if not: --format images or image_folder",
        )
    return TesseraError(
        f"{source} has no known format ({', '.join(importers.names())})",
        hint="put each class in a folder of its own: SOURCE/CLASS/IMAGE.jpg",
    )


def image_names_hint() -> str:
    return f"images are files named {' '.join(sorted(IMAGE_SUFFIXES))}"
