"""The model families. The folder is the registry: a file in it is a family of that name.

A family may also lie outside of it, in any module that Python can import: then its name is the
module's, with the dot, like `mylab.mixer`. Must not know any family.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from models.core.errors import UsageError, unknown

if TYPE_CHECKING:
    from models.core.family import Family


def names() -> list[str]:
    """Names of all families in this folder, without importing one."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


@cache
def get(name: str) -> Family[Any]:
    """The family called `name`. Raises UsageError with the nearest known name; for a dotted name,
    with what is missing where this process runs."""
    if "." in name and name not in names():
        family = _outside(name)
    elif name in names():
        family = importlib.import_module(f"models.{name}").FAMILY
    else:
        raise unknown("family", name, names())
    family.name = name
    return family


def _outside(name: str) -> Family[Any]:
    """The family in a module that isn't ours."""
    if name.split(".")[0] == __name__:
        raise unknown("family", name, names())
    spec = _locate(name)
    if spec is None:
        raise UsageError(
            f"the family {name!r} is a Python module that can't be found here",
            hint="put the folder that its name begins in on PYTHONPATH, or install its package: "
            "here, and on every machine of a Ray cluster",
        )
    if not _has_family(spec):
        raise UsageError(
            f"the module {name!r} has no family: {spec.origin} says nothing of FAMILY",
            hint="end it with a line like: FAMILY = Mixer()",
        )
    try:
        family = importlib.import_module(name).FAMILY
    except ImportError as error:
        raise UsageError(
            f"the family {name!r} can't be imported: {error}",
            hint="install what it needs: here, and on every machine of a Ray cluster",
        ) from error
    from models.core.family import Family

    if not isinstance(family, Family):
        raise UsageError(
            f"FAMILY in {spec.origin} is a {type(family).__name__}, no family",
            hint="its class derives from models.core.family.Family, or from Classifier",
        )
    return family


def _locate(name: str) -> ModuleSpec | None:
    """Where a module would come from. Unlike importlib's own search it runs nothing of the packages
    that the module is in: a recipe can come from somewhere else, and may name anything."""
    spec, path = None, None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        if end > 1 and path is None:
            return None
        found = (f.find_spec(".".join(parts[:end]), path) for f in sys.meta_path)
        spec = next((s for s in found if s), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _has_family(spec: ModuleSpec) -> bool:
    """Whether the module's source sets FAMILY, seen without running it."""
    get_source = getattr(spec.loader, "get_source", None)
    source = get_source(spec.name) if get_source else None
    try:
        tree = ast.parse(source or "")
    except SyntaxError as error:
        raise UsageError(f"{spec.origin}, line {error.lineno}: {error.msg}") from None
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return any(isinstance(t, ast.Name) and t.id == "FAMILY" for t in targets)
