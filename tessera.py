"""Tessera's public Python API.

In: plain arguments. Out: results of the workflows. Loads nothing until it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import NoReturn

# ── the command, and folders of the same names as Tessera's packages ──────────────────────────

_PACKAGES = ("jobs", "models", "pipelines")
"""Names so common that a user's project may have folders of them, which come first on `sys.path` with
`PYTHONPATH=.` or `python -m`."""
_ROOT = Path(__file__).resolve().parent


class _OwnPackages(MetaPathFinder):
    """Finds Tessera's packages beside this file, whatever `sys.path` says."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _PACKAGES and path is None:
            return PathFinder.find_spec(fullname, [str(_ROOT)])
        return None


def _hidden() -> dict[str, Path]:
    """Package -> the folder that would be imported instead of Tessera's own."""
    found = {}
    for name in _PACKAGES:
        module = sys.modules.get(name)
        spec = module.__spec__ if module else PathFinder.find_spec(name)
        folders = [
            Path(each).resolve() for each in (spec and spec.submodule_search_locations) or []
        ]
        if folders and folders[0] != _ROOT / name:
            found[name] = folders[0]
    return found


def is_hidden_for_workers() -> bool:
    """Whether a Ray worker of this process would import a package from somewhere else: Ray puts the
    current folder first on the `sys.path` of its workers."""
    for name in _PACKAGES:
        spec = PathFinder.find_spec(name, [os.getcwd(), *sys.path])
        folders = list((spec and spec.submodule_search_locations) or [])
        if folders and Path(folders[0]).resolve() != _ROOT / name:
            return True
    return False


def use_own_packages() -> None:
    """Makes Tessera's packages the ones that are imported in this process. Does nothing if they are
    already. Exits with one line if a hiding folder has been imported before."""
    in_the_way = _hidden()
    if imported := [name for name in in_the_way if name in sys.modules]:
        raise SystemExit(f"tessera: {_explain(in_the_way[imported[0]])}")
    if in_the_way and not any(isinstance(finder, _OwnPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OwnPackages())


def _explain(folder: Path) -> str:
    """One line about a folder that is in the way."""
    return (
        f"the folder {folder} hides Tessera's package {folder.name!r}; rename it, or take "
        f"{folder.parent} off PYTHONPATH"
    )


def main() -> NoReturn:
    """The `tessera` command, which is also `python -m tessera`."""
    use_own_packages()
    from jobs.cli import main as command

    command()


if __name__ == "__main__":
    main()
