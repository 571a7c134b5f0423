"""The data set formats. The folder is the registry: a file in it is a format of that name.

In: the name of a format. Out: its importer. Must not know any format.

An importer may also come from outside, from any module that Python can import. Its name is then the
module's, as in `mylab.dicom_folder`, or module and attribute, as in `mylab.formats:dicom_folder`.
`pipelines/data/sources.py` says what an importer has.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import cast

from models.core.errors import UsageError, unknown
from pipelines.data.sources import Importer

REQUIRED = ("OPTIONS", "read")
"""What an importer from outside must have. It is always named, so nothing asks what it
recognises."""


def names() -> list[str]:
    """Names of all formats in this folder, without importing one."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def get(name: str) -> Importer:
    """The importer called `name`: a file of this folder, `MODULE` or `MODULE:ATTRIBUTE`.

    Raises UsageError for an unknown format with the nearest known name, and for a module that can't
    be imported or isn't an importer.
    """
    if name in names():
        return cast(Importer, importlib.import_module(f"{__name__}.{name}"))
    if "." in name or ":" in name:
        return _from_outside(name)
    raise unknown("format", name, names())


def _from_outside(name: str) -> Importer:
    module_name, _, attribute = name.partition(":")
    found: object = _import(name, module_name)
    for part in filter(None, attribute.split(".")):
        if not hasattr(found, part):
            raise UsageError(
                f"the format {name!r}: the module {module_name!r} has no {attribute!r}",
                hint="give MODULE:ATTRIBUTE, where the attribute has OPTIONS and read",
            )
        found = getattr(found, part)
    missing = [part for part in REQUIRED if not hasattr(found, part)]
    if missing:
        raise UsageError(
            f"the format {name!r} has no {' and no '.join(missing)}",
            hint="an importer has OPTIONS, a dict of option names and help texts, and the function "
            "read(source, options), which returns a pipelines.data.sources.Source",
        )
    return cast(Importer, found)


def _import(name: str, module_name: str) -> object:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken(name, error) from error
    except SyntaxError as error:
        raise UsageError(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    except Exception as error:  # whatever the module raises when it is imported
        raise _broken(name, error) from error
    if "." not in module_name:  # more likely a format of ours, misspelt
        raise unknown("format", module_name, names())
    raise UsageError(
        f"the format {name!r}: there is no module {module_name!r}",
        hint="put the folder that contains it on PYTHONPATH, or install its package: here, and on "
        "every machine of a Ray cluster",
    )


def _broken(name: str, error: Exception) -> UsageError:
    return UsageError(
        f"the format {name!r} can't be imported: {type(error).__name__}: {error}",
        hint="install what it needs: here, and on every machine of a Ray cluster",
    )
