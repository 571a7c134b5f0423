"""The house's import rules, held by reading every file's imports.

A failure names the file and the rule that it breaks.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("models", "pipelines", "jobs")
HEAVY = {
    "ray",
    "mlflow",
    "webdataset",
    "torchvision",
    "matplotlib",
    "sklearn",
    "fsspec",
    "s3fs",
    "pycocotools",
    "onnx",
    "onnxscript",
    "onnxruntime",
}
ROOMS = {
    "webdataset": {"pipelines/data/shards.py"},
    "fsspec": {"pipelines/storage/object_store.py"},
    "mlflow": {
        "pipelines/tracking/mlflow_runs.py",
        "pipelines/tracking/mlflow_registry.py",
        "pipelines/tracking/mlflow_model.py",
        "pipelines/tracking/system_metrics.py",
    },
    "ray": {
        "pipelines/cluster/connection.py",
        "pipelines/cluster/jobs.py",
        "pipelines/cluster/tasks.py",
        "pipelines/cluster/workers.py",
        "pipelines/cluster/tuner.py",
    },
    "onnx": {"pipelines/inference/export.py"},
    "onnxscript": {"pipelines/inference/export.py"},
    "onnxruntime": {"pipelines/inference/export.py"},
}
ROOM_FILES = set().union(*ROOMS.values())
SHARED_WITH_ROOMS = {
    "models.core.errors",
    "pipelines.interfaces",
    "pipelines.data.card",
    "pipelines.data.index",
    "pipelines.storage.atomic",
    "pipelines.storage.retry",
    "pipelines.storage.remote",
    "pipelines.storage.base",
    "pipelines.data.tar",
}
JOINERS = {"pipelines/training/worker.py"}
FILES = sorted(p for top in OURS for p in (ROOT / top).rglob("*.py"))


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with `top_only` those that importing the file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _top(tree) if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _top(tree: ast.Module) -> Iterator[ast.AST]:
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        yield node
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not is_typing and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack.extend(ast.iter_child_nodes(node))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


ROOM_MODULES = {f.removesuffix(".py").replace("/", ".") for f in ROOM_FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_keep_to_the_rules(path: Path) -> None:
    name = name_of(path)
    top = name.split("/")[0]
    for imported in imports(path):
        first = imported.split(".")[0]
        if first in OURS:
            assert OURS.index(first) <= OURS.index(top), f"{name}: {top} must not import {first}"
        if first in ROOMS:
            allowed = name in ROOMS[first]
            assert allowed, f"{name}: only {sorted(ROOMS[first])} may import {first}"
        if imported.startswith("torch.distributed"):
            assert name == "pipelines/training/distributed.py", (
                f"{name}: torch.distributed has one room"
            )
        if top == "pipelines" and name not in JOINERS and first in OURS:
            _check_room(name, imported)


def _check_room(name: str, imported: str) -> None:
    room = next((m for m in ROOM_MODULES if imported == m or imported.startswith(m + ".")), None)
    if name in ROOM_FILES:
        library = next(lib for lib, files in ROOMS.items() if name in files)
        own = room is not None and room.replace(".", "/") + ".py" in ROOMS[library]
        shared = any(imported == m or imported.startswith(m + ".") for m in SHARED_WITH_ROOMS)
        contract = imported.startswith(("pipelines.data.images", "models.core"))
        assert own or shared or contract, f"{name}: a room must not import {imported}"
    elif not name.startswith("pipelines/data/"):
        assert room is None, f"{name}: the core must not import the room {imported}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_importing_loads_no_heavy_library(path: Path) -> None:
    heavy = {i.split(".")[0] for i in imports(path, top_only=True)} & HEAVY
    assert not heavy, f"{name_of(path)}: imports {sorted(heavy)} when it is imported"
    if name_of(path).startswith("jobs/"):
        early = [i for i in imports(path, top_only=True) if i.split(".")[0] == "torch"]
        assert not early, f"{name_of(path)}: imports torch when it is imported"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body, f"{name_of(path)}: no docstring"


def test_importing_everything_has_no_effect(tmp_path: Path) -> None:
    """No folder, thread, environment variable or heavy library appears, in a process that imports
    every module of ours."""
    modules = [module_of(p) for p in FILES]
    code = (
        "import importlib, os, sys, threading\n"
        "import torch, safetensors.torch, rich, click, yaml, pydantic, numpy, PIL\n"
        "before = dict(os.environ), threading.active_count()\n"
        f"for m in {modules!r}: importlib.import_module(m)\n"
        "assert dict(os.environ) == before[0], 'environment'\n"
        "assert threading.active_count() == before[1], 'threads'\n"
        f"heavy = [m for m in {sorted(HEAVY)!r} if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert os.listdir() == [], os.listdir()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "..")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_mlflow_folder_shadows_nothing() -> None:
    """A folder `mlflow/` with Python in it would be imported in place of the library."""
    assert not list((ROOT / "mlflow").rglob("*.py"))


def test_the_rules_bite(tmp_path: Path) -> None:
    """The reader of imports sees an import in a function, and at the top, for what it is."""
    file = tmp_path / "x.py"
    file.write_text("import a\ndef f():\n    from ray import b\nclass C:\n    import c\n")
    assert set(imports(file)) == {"a", "ray.b", "c"}
    assert set(imports(file, top_only=True)) == {"a", "c"}
