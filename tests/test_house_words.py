"""The rules for words and texts, held by reading every file. Each test lists all violations of its
rule.

The rules themselves are explained in CONTRIBUTING.md; those for layers and layout are tested in
`test_house.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from source_tree import FILES, MODULES, OURS, ROOT, TESTS, check, name_of, text_of, top_nodes, tree

IMPORT_LINE = re.compile(
    rf"^\s*((?:from (?:{'|'.join(OURS)})[\w.]* import|import (?:{'|'.join(OURS)})\b)[^;\n#]*)", re.M
)
"""An import of ours, alone on its line or before a semicolon."""
QUOTED_IMPORT = re.compile(rf"""["'n;]\s*(?:from|import) (?:{"|".join(OURS)})""")
"""The same in source text, after a quote, an escaped end of line or a semicolon."""


# ── programs in strings ───────────────────────────────────────────────────────────────────────


def test_programs_in_strings_import_what_exists() -> None:
    """Tests and benchmarks run programs that are written in strings, which no checker reads."""
    files = {*TESTS.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")} - {Path(__file__)}
    check(problem for path in files for problem in _unknown_imports(path))


def _unknown_imports(path: Path) -> Iterator[str]:
    text = text_of(path)
    if not QUOTED_IMPORT.search(text) and not any(map(_unknown_import, IMPORT_LINE.findall(text))):
        return  # most files: spare them the parser
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
    for node in top_nodes(tree(path)):
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


def stem(word: str) -> str:
    """Letters that every match of the regular expression has. To look for them first is fast."""
    always = re.sub(r"\\b|\w\?|\([^)]*\)\??", " ", word)
    return max(re.findall("[a-z]+", always), key=len)


def test_the_words_of_the_field_are_used() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    own = [path for path in TESTS.rglob("*.py") if path != Path(__file__)]
    check(
        f"{name_of(path)}:{number} has {match[0]!r}, better: {instead}"
        for path in [*FILES, *pages, *own]
        for word, instead in WORDS.items()
        if stem(word) in text_of(path)
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if (match := re.search(word, line))
    )


# ── the rules bite ────────────────────────────────────────────────────────────────────────────


def test_an_import_in_a_string_is_resolved() -> None:
    known = ["import tessera", "from pipelines.data import card, shards", "import models.core"]
    assert not any(map(_unknown_import, known))
    assert _unknown_import("from pipelines.data.card import Nothing")
    assert _unknown_import("from pipelines.nothing import Card")
    assert _unknown_import("import jobs.nothing")
    assert IMPORT_LINE.findall("x = 1\n  from models import get; get()\n") == [
        "from models import get"
    ]


def test_stems_are_in_every_match() -> None:
    matches = ["mend", "mending", "receipt", "receipts", "look-alike", "Lookalike", "Draws("]
    matches += [": Draws", "take over", "takes over", "examines", "goes on with"]
    found = {word for word in WORDS for text in matches if re.search(word, text)}
    assert len(found) == 7
    for word in found:
        assert all(stem(word) in text for text in matches if re.search(word, text)), word
