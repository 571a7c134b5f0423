"""Tessera's public Python API: from a folder of images to a promoted model.

    import tessera

    data = tessera.pack("photos", to="data/photos")
    run = tessera.train("resnet", data=data, set={"train.epochs": 3})
    report = tessera.evaluate(run.version, data=data)
    tessera.promote(run.version)
    model = tessera.load("photos@champion")
    for prediction in model.predict(["a.jpg", "b.jpg"]):
        print(prediction.label, prediction.probability)

Every function does what the verb of the same name does, with the same defaults. `data` is a path,
an address or what `pack` returned; a model is a reference (`NAME`, `NAME/2`, `NAME@champion`) or a
version that a function returned. Bad input raises `TesseraError` with the text that the command
prints, and a wrong argument or setting `UsageError`, which is one.

In: plain arguments. Out: the typed results of `pipelines/workflows`. Importing this module loads
nothing else of Tessera; a function is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from models.core.errors import TesseraError as TesseraError
    from models.core.errors import UsageError as UsageError
    from pipelines.workflows.context import Context as Context
    from pipelines.workflows.evaluate import evaluate as evaluate
    from pipelines.workflows.export import export as export
    from pipelines.workflows.fix import fix as fix
    from pipelines.workflows.pack import pack as pack
    from pipelines.workflows.predict import load as load
    from pipelines.workflows.predict import predict as predict
    from pipelines.workflows.promote import promote as promote
    from pipelines.workflows.promote import rollback as rollback
    from pipelines.workflows.train import train as train
    from pipelines.workflows.tune import tune as tune

_MODULES = {
    "pack": "pipelines.workflows.pack",
    "fix": "pipelines.workflows.fix",
    "train": "pipelines.workflows.train",
    "tune": "pipelines.workflows.tune",
    "evaluate": "pipelines.workflows.evaluate",
    "promote": "pipelines.workflows.promote",
    "rollback": "pipelines.workflows.promote",
    "predict": "pipelines.workflows.predict",
    "load": "pipelines.workflows.predict",
    "export": "pipelines.workflows.export",
    "Context": "pipelines.workflows.context",
    "TesseraError": "models.core.errors",
    "UsageError": "models.core.errors",
}

__all__ = [
    "Context",
    "TesseraError",
    "UsageError",
    "evaluate",
    "export",
    "fix",
    "load",
    "pack",
    "predict",
    "promote",
    "rollback",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tessera' has no attribute {name!r}")
    use_own_packages()
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access doesn't come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# ── the command, and folders of the same names as Tessera's packages ──────────────────────────

_PACKAGES = ("jobs", "models", "pipelines")
"""Names so common that a user's project may have folders of them. These come first on `sys.path`
with `PYTHONPATH=.` or `python -m`."""
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


def use_own_packages() -> None:
    """Makes Tessera's packages the ones that are imported in this process. Does nothing if they are
    already. Raises ImportError if a hiding folder has been imported before."""
    in_the_way = _hidden()
    if imported := [name for name in in_the_way if name in sys.modules]:
        raise ImportError(_explain(in_the_way[imported[0]]))
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
    try:
        use_own_packages()
    except ImportError as error:
        raise SystemExit(f"tessera: {error}") from None
    importlib.import_module("jobs.cli").main()
    raise AssertionError("the command exits by itself")


if __name__ == "__main__":
    main()
