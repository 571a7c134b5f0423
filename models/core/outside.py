"""Objects in modules from outside the project: a family, a metric.

In: the name of a module and of an attribute in it. Out: the object. A module is found, and its
source is searched for the attribute, before anything in it runs: a recipe can come from somebody
else, and may name any module that is installed. Must not know what the object is for.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec

from models.core.errors import UsageError

EVERYWHERE = "here, and on every machine of a Ray cluster"


def load(kind: str, name: str, module: str, attribute: str, *, example: str) -> object:
    """The attribute of a module.

    Raises UsageError if the module can't be found or imported, or doesn't define the attribute.

    Args:
        kind: What the object is, for messages: "family".
        name: How the user named it.
        example: A line that defines such an object.
    """
    spec = _find(module)
    if spec is None:
        raise UsageError(
            f"the {kind} {name!r}: the Python module {module!r} can't be found here",
            hint="put the folder that contains it on PYTHONPATH, or install its package: "
            f"{EVERYWHERE}",
        )
    if attribute not in _defined_names(spec):
        raise UsageError(
            f"the {kind} {name!r}: {spec.origin} doesn't define {attribute}",
            hint=f"add a line like: {example}",
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UsageError(
            f"the {kind} {name!r} can't be imported: {error}",
            hint=f"install what it needs: {EVERYWHERE}",
        ) from error


def _find(name: str) -> ModuleSpec | None:
    """Where a module would be imported from. Unlike `importlib.util.find_spec` this runs no code of
    the packages that contain it."""
    spec, path = None, None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        if end > 1 and path is None:
            return None
        specs = (finder.find_spec(".".join(parts[:end]), path) for finder in sys.meta_path)
        spec = next((s for s in specs if s), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _defined_names(spec: ModuleSpec) -> set[str]:
    """Names that the module's source assigns, defines or imports at its top level."""
    get_source = getattr(spec.loader, "get_source", None)
    source = get_source(spec.name) if get_source else None
    try:
        tree = ast.parse(source or "")
    except SyntaxError as error:
        raise UsageError(f"{spec.origin}, line {error.lineno}: {error.msg}") from None
    return {name for node in tree.body for name in _names(node)}


def _names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))
