"""The model families. The folder is the registry: a file in it is a family of that name.

A family may also lie outside of this folder, in any module that Python can import. Its name is then
the name of the module, with a dot, like `mylab.mixer`. Must not know any family.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from models.core import outside
from models.core.errors import UsageError, unknown

if TYPE_CHECKING:
    from models.core.family import Family


def names() -> list[str]:
    """Names of all families in this folder. Imports none of them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


@cache
def get(name: str) -> Family[Any]:
    """The family called `name`.

    Raises UsageError for an unknown name, with the nearest known one; for a dotted name if its
    module can't be found or imported, or has no family.
    """
    if "." in name and name.split(".")[0] != __name__:
        family = _from_outside(name)
    elif name in names():
        family = importlib.import_module(f"models.{name}").FAMILY
    else:
        raise unknown("family", name, names())
    family.name = name
    return family


def _from_outside(name: str) -> Family[Any]:
    family = outside.load("family", name, name, "FAMILY", example="FAMILY = Mixer()")
    from models.core.family import Family, Task

    if not isinstance(family, Family):
        raise UsageError(
            f"FAMILY in the module {name} is of type {type(family).__name__}, not a Family",
            hint="its class derives from models.core.family.Family, or from Classifier",
        )
    if not isinstance(getattr(family, "task", None), Task):
        raise UsageError(
            f"the family {name!r} has no task",
            hint="set `task` to one of models/tasks, or to an object whose class derives from Task",
        )
    return family
