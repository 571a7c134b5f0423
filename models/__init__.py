"""The model families. The folder is the registry: a file in it is a family of that name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from models.core.errors import unknown

if TYPE_CHECKING:
    from models.core.family import Family


def names() -> list[str]:
    """Names of all families, without importing one."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


@cache
def get(name: str) -> Family[Any]:
    """The family called `name`; raises UsageError with the nearest known name."""
    if name not in names():
        raise unknown("family", name, names())
    family: Family[Any] = importlib.import_module(f"models.{name}").FAMILY
    family.name = name
    return family
