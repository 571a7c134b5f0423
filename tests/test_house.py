"""The rules for layers and layout, held by reading every file. Each test lists all violations of
its rule.

The rules themselves are explained in CONTRIBUTING.md; those for words and texts are tested in
`test_house_words.py`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from source_tree import (
    FILES,
    MODULES,
    ROOT,
    TESTS,
    check,
    facts,
    imports,
    name_of,
    text_of,
    tree,
)

LAYERS = (
    ("jobs",),
    ("pipelines/workflows",),
    ("pipelines/promotion", "pipelines/evaluation", "pipelines/inference", "pipelines/search"),
    ("pipelines/training",),
    ("pipelines/data", "pipelines/tracking", "pipelines/cluster", "pipelines/visuals"),
    ("pipelines/storage",),
    ("pipelines",),
    ("models",),
)
"""From top to bottom: a file imports from its own layer and from those below it."""

ROOMS = {
    "mlflow": "pipelines/tracking/",
    "ray": "pipelines/cluster/",
    "webdataset": "pipelines/data/shards.py",
    "fsspec": "pipelines/storage/",
    "onnx": "pipelines/inference/",
    "onnxscript": "pipelines/inference/",
    "onnxruntime": "pipelines/inference/",
    "torch.distributed": ("pipelines/training/distributed.py", "pipelines/cluster/rendezvous.py"),
}
"""The only folder or file that may import a library."""

HEAVY = {
    *("ray", "mlflow", "webdataset", "torchvision", "matplotlib", "sklearn", "scipy"),
    *("fsspec", "s3fs", "pycocotools", "onnx", "onnxscript", "onnxruntime"),
}
"""Libraries that no module of ours loads when it is imported."""

MOST_LINES = 465
NOT_MIRRORED = ("support", "integration", "faults", "docs", "benchmarks", "deploy", "cluster")
"""Folders of tests/ whose files aren't about one module."""


# ── layers ────────────────────────────────────────────────────────────────────────────────────

IN_LAYERS = [path for path in FILES if path.name != "tessera.py"]
"""`tessera.py` is the door: it names functions of the workflows and loads them when they are used,
and it finds the packages of the project. It imports nothing at once, so anybody may import it."""


def resolve(imported: str) -> Path | None:
    """The file of ours that an imported name leads to."""
    return MODULES.get(imported) or MODULES.get(imported.rpartition(".")[0])


@cache
def imported_files(path: Path) -> set[Path]:
    found = {file for name in imports(path) if (file := resolve(name))}
    return {file for file in found if file in IN_LAYERS} - {path}


def layer_of(path: Path) -> int:
    name = name_of(path).removesuffix(".py")
    matches = [
        (len(folder), number)
        for number, layer in enumerate(LAYERS)
        for folder in layer
        if name == folder or name.startswith(f"{folder}/")
    ]
    return max(matches)[1]


# ── who imports whom ──────────────────────────────────────────────────────────────────────────


def test_imports_point_downwards() -> None:
    check(
        f"{name_of(path)} imports {name_of(other)}"
        for path in IN_LAYERS
        for other in imported_files(path)
        if layer_of(other) < layer_of(path)
    )


def test_each_library_is_imported_in_one_room() -> None:
    check(
        f"{name_of(path)} imports {imported}: only {room} may"
        for path in FILES
        for imported in imports(path)
        for library, room in ROOMS.items()
        if f"{imported}.".startswith(f"{library}.") and not name_of(path).startswith(room)
    )


def circles(arrows: dict[str, set[str]]) -> Iterator[list[str]]:
    """Groups of nodes that can reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> Iterator[list[str]]:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in index:
                yield from visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                yield sorted(group)

    for node in arrows:
        if node not in index:
            yield from visit(node)


def test_no_import_circle_among_files() -> None:
    arrows = {name_of(path): {name_of(p) for p in imported_files(path)} for path in IN_LAYERS}
    check(" <-> ".join(group) for group in circles(arrows))


def test_no_import_circle_among_folders() -> None:
    """A package's `__init__.py` stands for the whole package, not for its folder."""
    arrows: dict[str, set[str]] = {}
    for path in IN_LAYERS:
        own = name_of(path.parent)
        others = {name_of(p.parent) for p in imported_files(path) if p.name != "__init__.py"}
        arrows.setdefault(own, set()).update(others - {own})
    check(" <-> ".join(group) for group in circles(arrows))


def test_importing_loads_no_heavy_library() -> None:
    check(
        f"{name_of(path)} imports {imported} when it is imported"
        for path in FILES
        for imported in imports(path, top_only=True)
        if imported.split(".")[0] in HEAVY
    )


def test_collecting_the_tests_loads_no_heavy_library() -> None:
    """Every worker process collects all tests, and runs a part of them."""
    libraries = (HEAVY | {"boto3", "skimage"}) - {"pycocotools"}
    line = re.compile(rf"^(import|from) ({'|'.join(libraries)})\b", re.MULTILINE)
    check(
        f"{name_of(path)} imports {imported} when it is collected"
        for path in TESTS.rglob("*.py")
        if line.search(text_of(path))  # in a program in a string, it is no import
        for imported in imports(path, top_only=True)
        if imported.split(".")[0] in libraries
    )


def test_no_verb_loads_torch() -> None:
    """Neither by itself nor through what it imports: `--help` answers at once."""
    modules = [m for m in MODULES if m.split(".")[0] in ("jobs", "tessera")]
    code = (
        "import importlib, sys\n"
        f"for m in {modules!r}:\n"
        "    importlib.import_module(m)\n"
        "    assert 'torch' not in sys.modules, m\n"
    )
    _run(code, ROOT)


@pytest.mark.slow
def test_importing_everything_has_no_effect(tmp_path: Path) -> None:
    """No folder, thread, environment variable or heavy library appears in a process that imports
    every module of ours and gets every family."""
    code = (
        "import importlib, os, sys, threading\n"
        "import torch, safetensors.torch, rich, click, yaml, pydantic, numpy, PIL\n"
        "before = dict(os.environ), threading.active_count()\n"
        f"for m in {list(MODULES)!r}: importlib.import_module(m)\n"
        "import models\n"
        "for name in models.names(): models.get(name)\n"
        "assert dict(os.environ) == before[0], 'environment'\n"
        "assert threading.active_count() == before[1], 'threads'\n"
        f"heavy = [m for m in {sorted(HEAVY)!r} if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert os.listdir() == [], os.listdir()\n"
    )
    _run(code, tmp_path)


def _run(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder / "..")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ── what a file may hold ──────────────────────────────────────────────────────────────────────


def test_every_module_has_a_docstring() -> None:
    check(name_of(path) for path in FILES if not facts(path).has_docstring)


def test_no_file_is_too_long() -> None:
    every = [*FILES, *TESTS.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    lengths = {path: len(text_of(path).splitlines()) for path in every}
    check(f"{name_of(path)}: {n} lines" for path, n in lengths.items() if n > MOST_LINES)


def test_workflows_neither_print_nor_parse_nor_read_the_environment() -> None:
    check(
        f"{name_of(path)}: {problem}"
        for path in (ROOT / "pipelines" / "workflows").glob("*.py")
        for problem in _side_effects(path)
    )


def _side_effects(path: Path) -> Iterator[str]:
    yield from (f"imports {i}" for i in imports(path) if i.split(".")[0] in ("click", "rich"))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            yield f"line {node.lineno}: print"
    if path.name != "context.py":
        yield from (f"line {line}: reads the environment" for line in _environment_reads(path))


def _environment_reads(path: Path) -> set[int]:
    """Line numbers. `os.environ.setdefault` is no reading: Ray and MLflow have settings that can be
    made only there."""
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)]
    lines = {n.lineno for n in nodes if ast.unparse(n) in ("os.environ", "os.getenv")}
    return lines - {n.lineno for n in nodes if ast.unparse(n) == "os.environ.setdefault"}


def test_mlflow_folder_shadows_nothing() -> None:
    """A folder `mlflow/` with Python in it would be imported in place of the library."""
    assert not list((ROOT / "mlflow").rglob("*.py"))


# ── tests mirror modules ──────────────────────────────────────────────────────────────────────


def mirrored_tests() -> list[Path]:
    files = [path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")]
    return [
        path
        for path in files
        if len(path.parts) > 1
        and path.parts[0] not in NOT_MIRRORED
        and not path.name.startswith(("test_contract", "test_every_"))  # all of their folder
    ]


def module_tested_by(test: Path) -> Path | None:
    """The module that a test file is named after: test_NAME.py or test_NAME_MORE.py."""
    words = test.stem.removeprefix("test_").split("_")
    for end in range(len(words), 0, -1):
        name = "_".join(words[:end])
        if test.parent.name == name:  # the folder as a whole
            return ROOT / test.parent
        for path in (test.parent / f"{name}.py", test.parent / name / "__init__.py"):
            if (ROOT / path).is_file():
                return ROOT / path
    return None


def test_every_test_file_is_named_after_a_module() -> None:
    check(f"tests/{path.as_posix()}" for path in mirrored_tests() if not module_tested_by(path))


TESTED_WITH = {
    "pipelines/cluster/event_sink.py": "pipelines/cluster/test_workers.py",
    "pipelines/cluster/jobs.py": "jobs/test_submit.py",
    "pipelines/evaluation/report.py": "pipelines/evaluation/test_job.py",
    "pipelines/evaluation/robustness.py": "pipelines/evaluation/test_job.py",
    "pipelines/tracking/mlflow_files.py": "pipelines/tracking/test_mlflow_registry.py",
    "pipelines/training/loaded_model.py": "pipelines/evaluation/test_job.py",
    "pipelines/training/previews.py": "pipelines/training/test_trainer.py",
    "pipelines/workflows/copy_model.py": "jobs/test_promote.py",
    "pipelines/workflows/prediction_files.py": "pipelines/workflows/test_predict.py",
}
"""Modules that do something only on a cluster, with a service or with a trained model: the tests
that have one call them too."""


def files_named_after(path: Path) -> set[Path]:
    """Test files of a module: `test_NAME.py` or `test_NAME_MORE.py` in its folder of tests, or in
    `integration`. The tests of NAME_PART.py may be those of NAME.py beside it, and a verb and its
    workflow may share theirs."""
    name = name_of(path.with_suffix(""))
    folder, _, stem = name.rpartition("/")
    stems = [stem]
    words = stem.split("_")
    stems += [
        s
        for n in range(1, len(words))
        if (path.parent / f"{(s := '_'.join(words[:n]))}.py").exists()
    ]
    folders = [folder, "integration"]
    shared = {"jobs": "pipelines/workflows", "pipelines/workflows": "jobs"}.get(folder)
    if shared and (ROOT / shared / path.name).exists():
        folders.append(shared)
    return {
        test
        for room in folders
        for test in (TESTS / room).glob("test_*.py")
        if any(f"{test.stem}_".startswith(f"test_{one}_") for one in stems)
    }


def test_every_module_has_tests_of_its_name() -> None:
    """The families are tested by the contract of all of them."""
    modules = [p for p in FILES if p.stem not in ("__init__", "tessera")]
    modules = [p for p in modules if p.parent != ROOT / "models" and facts(p).has_logic]
    check(
        f"{name_of(path)} has no test file of its name"
        for path in modules
        if not files_named_after(path) and name_of(path) not in TESTED_WITH
    )


def test_the_modules_that_are_tested_with_others_have_no_tests_of_their_own() -> None:
    check(
        f"{module} in TESTED_WITH"
        for module, test in TESTED_WITH.items()
        if files_named_after(ROOT / module) or not (TESTS / test).is_file()
    )


# ── the rules bite ────────────────────────────────────────────────────────────────────────────


def test_the_reader_of_imports_sees_functions_and_classes(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import a\ndef f():\n    from ray import b\nclass C:\n    import c\n")
    assert set(imports(file)) == {"a", "ray.b", "c"}
    assert set(imports(file, top_only=True)) == {"a", "c"}


def test_a_circle_is_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert list(circles(arrows)) == [["a", "b", "c"]]
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": set()})) == []


def test_layers_are_told_apart() -> None:
    names = ["jobs/train.py", "pipelines/search/space.py", "pipelines/recipe.py"]
    assert [layer_of(ROOT / name) for name in names] == [0, 2, 6]
