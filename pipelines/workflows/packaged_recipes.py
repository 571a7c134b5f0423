"""The measured recipes that are installed with Tessera, and their results.

In: a name such as `digits`. Out: the recipe's file, and the results in the comment at its top,
which `make measure` writes. Must not know any service.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import models
from models.core.errors import UsageError, unknown

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

FOLDER = Path(__file__).resolve().parents[2] / "jobs" / "recipes"


@dataclass(frozen=True)
class PackagedRecipe:
    """A packaged recipe: `data` is the data set it was measured on, `result` the test metrics as
    mean ± standard deviation over seeds, `duration` how long a training took."""

    name: str
    file: Path
    family: str
    data: str
    result: str
    duration: str


def names() -> list[str]:
    """Names of all packaged recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> PackagedRecipe:
    """The packaged recipe of this name. Raises UsageError with the nearest name."""
    if name not in names():
        raise unknown("recipe", name, names(), see="tessera families --recipes")
    file = FOLDER / f"{name}.yaml"
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    family = next(line for line in lines if line.startswith("family:"))
    return PackagedRecipe(
        name=name,
        file=file,
        family=family.removeprefix("family:").strip(),
        data=comment[0].rpartition("(DIR: ")[2].partition(",")[0] if comment else "",
        result=next((c.partition(" over ")[0] for c in comment if c.startswith("test ")), ""),
        duration=next((c.partition(" a training")[0] for c in comment if " a training " in c), ""),
    )


def is_family(what: str) -> bool:
    """Whether `what` names a family, or a module with one, rather than a recipe."""
    return not _is_file(what) and (what in models.names() or "." in what)


def _is_file(what: str) -> bool:
    return what.endswith((".yaml", ".yml", ".json")) or "/" in what


def start(what: str, variant: str | None = None) -> Recipe:
    """The recipe called `what`: a recipe file (a path, or anything that ends in .yaml, .yml or
    .json), a family, or a packaged recipe. A family comes before a recipe of the same name.

    Raises UsageError if nothing has this name.
    """
    from pipelines import recipe as recipes

    if is_family(what):
        return recipes.start(what, variant)
    is_file = _is_file(what)
    if not is_file and what not in names():
        raise unknown("family or recipe", what, [*models.names(), *names()], see="tessera families")
    if variant:
        raise UsageError("--variant is for a family, and this is a recipe", hint="remove --variant")
    return recipes.read(Path(what) if is_file else find(what).file)
