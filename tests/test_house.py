"""The rules of the house, held by reading every file. Each test lists all violations of its rule.

The rules themselves are explained in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
OURS = ("models", "pipelines", "jobs", "tessera")
FILES = [*sorted(p for top in OURS[:-1] for p in (ROOT / top).rglob("*.py")), ROOT / "tessera.py"]

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
    "torch.distributed": "pipelines/training/distributed.py",
}
"""The only folder or file that may import a library."""

HEAVY = {
    *("ray", "mlflow", "webdataset", "torchvision", "matplotlib", "sklearn", "scipy"),
    *("fsspec", "s3fs", "pycocotools", "onnx", "onnxscript", "onnxruntime"),
}
"""Libraries that no module of ours loads when it is imported."""

IMPORT_LINE = re.compile(
    rf"^\s*((?:from (?:{'|'.join(OURS)})[\w.]* import|import (?:{'|'.join(OURS)})\b)[^;\n#]*)", re.M
)
"""An import of ours, alone on its line or before a semicolon."""

MOST_LINES = 465
NOT_MIRRORED = ("support", "integration", "faults", "docs", "benchmarks", "deploy", "cluster")
"""Folders of tests/ whose files aren't about one module."""


# ── reading ───────────────────────────────────────────────────────────────────────────────────


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with `top_only` those that importing the file imports."""
    for node in _top(tree(path)) if top_only else ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _top(module: ast.Module) -> Iterator[ast.AST]:
    stack: list[ast.AST] = list(module.body)
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


MODULES = {module_of(path): path for path in FILES}
IN_LAYERS = [path for path in FILES if path.name != "tessera.py"]
"""`tessera.py` is the door: it names functions of the workflows and loads them when they are used,
and it finds the packages of the project. It imports nothing at once, so anybody may import it."""


def resolve(imported: str) -> Path | None:
    """The file of ours that an imported name leads to."""
    return MODULES.get(imported) or MODULES.get(imported.rpartition(".")[0])


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


def check(violations: Iterable[str]) -> None:
    found = sorted(violations)
    assert not found, "\n".join(["", *found])


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


def test_importing_everything_has_no_effect(tmp_path: Path) -> None:
    """No folder, thread, environment variable or heavy library appears in a process that imports
    every module of ours."""
    code = (
        "import importlib, os, sys, threading\n"
        "import torch, safetensors.torch, rich, click, yaml, pydantic, numpy, PIL\n"
        "before = dict(os.environ), threading.active_count()\n"
        f"for m in {list(MODULES)!r}: importlib.import_module(m)\n"
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
    check(name_of(path) for path in FILES if not ast.get_docstring(tree(path)) and tree(path).body)


def test_no_file_is_too_long() -> None:
    every = [*FILES, *TESTS.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in every}
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


# ── programs in strings ───────────────────────────────────────────────────────────────────────


def test_programs_in_strings_import_what_exists() -> None:
    """Tests and benchmarks run programs that are written in strings, which no checker reads."""
    files = {*TESTS.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")} - {Path(__file__)}
    check(problem for path in files for problem in _unknown_imports(path))


def _unknown_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for line in IMPORT_LINE.findall(node.value):
                if problem := _unknown_import(line):
                    yield f"{name_of(path)}:{node.lineno}: {line}: {problem}"


def _unknown_import(line: str) -> str | None:
    """What is wrong with an import of ours; None if it resolves, or if it is no Python."""
    try:
        (statement,) = ast.parse(line).body
    except SyntaxError:  # prose, or a line that a bracket continues
        return None
    if isinstance(statement, ast.Import):
        wrong = [alias.name for alias in statement.names if not _is_module(alias.name)]
        return f"there is no module {wrong[0]}" if wrong else None
    assert isinstance(statement, ast.ImportFrom)
    assert statement.module is not None
    if not _is_module(statement.module):
        return f"there is no module {statement.module}"
    wrong = [a.name for a in statement.names if not _is_defined(statement.module, a.name)]
    return f"{statement.module} has no {wrong[0]}" if wrong else None


def _is_module(name: str) -> bool:
    return (
        name.split(".")[0] not in OURS
        or name in MODULES
        or (ROOT / name.replace(".", "/")).is_dir()
    )


def _is_defined(module: str, name: str) -> bool:
    if _is_module(f"{module}.{name}"):
        return True
    return name in _names(MODULES[module]) if module in MODULES else False


@cache
def _names(path: Path) -> frozenset[str]:
    """The names that a module defines or imports at any depth outside of functions."""
    names: set[str] = set()
    for node in _top(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    if path == ROOT / "tessera.py":  # its names are loaded when used, from a table of strings
        names |= {str(n.value) for n in ast.walk(tree(path)) if isinstance(n, ast.Constant)}
    return frozenset(names)


# ── the words ─────────────────────────────────────────────────────────────────────────────────

WORDS = {
    r"\bmend(s|ed|ing)?\b": "repair, correct, hint",
    r"\bAsker\b": "Evaluator",
    r"\bAsked\b": "options, request",
    r"\bSubject\b": "LoadedModel",
    r"\bbadness\b": "error_score",
    r"\bspool": "event log",
    r"\bShipper\b": "Uploader",
    r"\bundelivered\b": "failed events",
    r"\bSeat\b": "ChampionState",
    r"\bOvertaken": "ConcurrentPromotionError",
    r"\bDraws\(|: Draws\b": "BatchRng",
    r"\bExamination\b": "evaluation job",
    r"\bexamin(e|es|ed|ing)\b": "evaluate, check",
    r"\btally\b": "statistics, counts",
    r"\breceipts?\b": "shard records",
    r"\benrol": "add to the gallery",
    r"\bgalleries\b": "identify",
    r"\bdrawn_twice\b": "resample_with_replacement",
    r"\bresamples\b": "bootstrap_samples",
    r"\bfrom_images\b": "takes_images",
    r"\bconsult\b": "apply_judge",
    r"\bgang\b": "persistent workers",
    r"\bmade_sources\b": "sample_sources",
    r"\bquietly\b": "suppress_…",
    r"[Ll]ook-?alike": "near duplicate",
    r"\b[Ww]hoever\b": "the user, the caller, code that",
    r"\bgoes on with\b": "continues, resumes",
    r"\btake(s|n)? over\b": "copy weights from, replace",
    r"\bwhat is given\b": "the argument, the input",
}
"""Words that must not return, as regular expressions, and the words of the field in their place."""


def test_the_words_of_the_field_are_used() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    own = [path for path in TESTS.rglob("*.py") if path != Path(__file__)]
    check(
        f"{name_of(path)}:{number} has {match[0]!r}, better: {instead}"
        for path in [*FILES, *pages, *own]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word, instead in WORDS.items()
        if (match := re.search(word, line))
    )


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


# ── the rules bite ────────────────────────────────────────────────────────────────────────────


def test_the_reader_of_imports_sees_functions_and_classes(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import a\ndef f():\n    from ray import b\nclass C:\n    import c\n")
    assert set(imports(file)) == {"a", "ray.b", "c"}
    assert set(imports(file, top_only=True)) == {"a", "c"}


def test_an_import_in_a_string_is_resolved() -> None:
    known = ["import tessera", "from pipelines.data import card, shards", "import models.core"]
    assert not any(map(_unknown_import, known))
    assert _unknown_import("from pipelines.data.card import Nothing")
    assert _unknown_import("from pipelines.nothing import Card")
    assert _unknown_import("import jobs.nothing")
    assert IMPORT_LINE.findall("x = 1\n  from models import get; get()\n") == [
        "from models import get"
    ]


def test_a_circle_is_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert list(circles(arrows)) == [["a", "b", "c"]]
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": set()})) == []


def test_layers_are_told_apart() -> None:
    names = ["jobs/train.py", "pipelines/search/space.py", "pipelines/recipe.py"]
    assert [layer_of(ROOT / name) for name in names] == [0, 2, 6]
