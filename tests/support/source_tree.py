"""The source of the project, for the tests of its rules.

In: the files of the working tree. Out: their texts, syntax trees, and facts about them. A tree is
made anew for each caller, because keeping all of them would slow down the garbage collector. What
several tests need of every file is a field of `Facts`, which are read once.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
OURS = ("models", "pipelines", "jobs", "tessera")
FILES = [*sorted(p for top in OURS[:-1] for p in (ROOT / top).rglob("*.py")), ROOT / "tessera.py"]


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def tree(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


@dataclass(frozen=True)
class Facts:
    """Of a file.

    imports, on_top  dotted names that it imports, and those that importing the file imports
    has_docstring    also if the file is empty
    has_logic        whether a function has two statements or more
    """

    imports: tuple[str, ...]
    on_top: tuple[str, ...]
    has_docstring: bool
    has_logic: bool


@cache
def facts(path: Path) -> Facts:
    module = tree(path)
    functions = [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef)]
    return Facts(
        *_imports(module, path),
        has_docstring=not module.body or bool(ast.get_docstring(module)),
        has_logic=any(len(f.body) - bool(ast.get_docstring(f)) > 1 for f in functions),
    )


def imports(path: Path, *, top_only: bool = False) -> tuple[str, ...]:
    """Dotted names that a file imports; with `top_only` those that importing the file imports."""
    return facts(path).on_top if top_only else facts(path).imports


def _imports(module: ast.Module, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    on_top = {id(node) for node in _statements(module, top_only=True)}
    names: list[tuple[str, bool]] = []
    for node in _statements(module):
        at_once = id(node) in on_top
        if isinstance(node, ast.Import):
            names += [(alias.name, at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [(f"{node.module}.{alias.name}", at_once) for alias in node.names]
    return tuple(name for name, _ in names), tuple(name for name, at_once in names if at_once)


def _statements(module: ast.Module, *, top_only: bool = False) -> Iterator[ast.AST]:
    """Every statement, or those that run when the file is imported. Expressions import nothing."""
    stack: list[ast.AST] = [module]
    while stack:
        node = stack.pop()
        yield node
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if top_only and (is_typing or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            stack.extend(getattr(node, field, ()))


def top_nodes(module: ast.Module) -> Iterator[ast.AST]:
    """Every node, expressions too, outside of functions."""
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


def check(violations: Iterable[str]) -> None:
    found = sorted(violations)
    assert not found, "\n".join(["", *found])
