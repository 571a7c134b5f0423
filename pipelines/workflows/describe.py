"""Describes a family or a packaged recipe.

In: a name. Out: a `FamilyDescription`: the family's task, its variants, and every setting of its
recipe, read from the dataclasses of the family, its task and the recipe: names, types, defaults,
and the docstring below each attribute. Or a `RecipeDescription`: what was measured, and the
settings that differ from the family's. `tessera describe` prints both, and the documentation's page
of settings is generated from them. Must not know any service.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SECTIONS = {
    "": "Recipe",
    "model": "Network",
    "augment": "Augmentation",
    "data": "Data",
    "optim": "Optimizer",
    "schedule": "Learning rate schedule",
    "train": "Training",
    "checkpoint": "Checkpoints",
    "workers": "Workers",
}
"""First part of a setting's path -> the heading above it."""


@dataclass(frozen=True)
class Setting:
    """One setting: its path for `--set`, its type as text, its default as plain data, and a help
    text, which is empty if its definition has no docstring."""

    path: str
    type: str
    default: Any
    help: str

    @property
    def section(self) -> str:
        """The first part of the path; empty for a path of one part."""
        return self.path.partition(".")[0] if "." in self.path else ""


@dataclass(frozen=True)
class Variant:
    """A variant, and the settings that differ from those of `base`."""

    name: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class FamilyDescription:
    """A family. `reads` is the annotation that it needs: images, classification, detection …
    `settings` have the defaults of `variant`."""

    family: str
    about: str
    task: str
    reads: str
    variant: str
    variants: tuple[Variant, ...]
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Difference:
    """A setting of a recipe that differs from the default of its family's variant. `default` is
    None for a setting that the default doesn't have."""

    path: str
    value: Any
    default: Any


@dataclass(frozen=True)
class RecipeDescription:
    """A packaged recipe: `data` is the data set it was measured on, `result` the test metrics,
    `duration` how long a training took."""

    recipe: str
    family: str
    variant: str
    data: str
    result: str
    duration: str
    settings: tuple[Difference, ...]


def describe_recipe(name: str) -> RecipeDescription:
    """The description of a packaged recipe. Raises UsageError if there is none of this name."""
    from pipelines import recipe as recipes
    from pipelines.workflows import packaged_recipes

    packaged = packaged_recipes.find(name)
    recipe = packaged_recipes.start(name)
    start = recipes.start(recipe.family, recipe.variant)
    default = dict(recipes.leaves(start.model_dump(mode="json")))
    return RecipeDescription(
        recipe=name,
        family=recipe.family,
        variant=recipe.variant,
        data=packaged.data,
        result=packaged.result,
        duration=packaged.duration,
        settings=tuple(
            Difference(path, value, default.get(path))
            for path, value in recipes.leaves(recipe.model_dump(mode="json"))
            if path not in default or default[path] != value
        ),
    )


def describe(family: str, variant: str = "base") -> FamilyDescription:
    """The description of a family, with the defaults of one variant.

    Raises UsageError with the nearest name if there is no such family or variant.
    """
    import models
    from pipelines import recipe as recipes

    described = models.get(family)
    recipe = recipes.start(family, variant)
    tree = recipe.model_dump(mode="json")
    base = dict(recipes.leaves(recipes.start(family).model_dump(mode="json")))
    variants = []
    for name in described.variants:
        values = dict(recipes.leaves(recipes.start(family, name).model_dump(mode="json")))
        changes = {path: v for path, v in values.items() if base.get(path, ...) != v}
        variants.append(Variant(name, {p: v for p, v in changes.items() if p != "variant"}))
    module = sys.modules[type(described).__module__].__doc__ or ""
    return FamilyDescription(
        family=family,
        about=module.strip().partition("\n")[0],
        task=described.task.name,
        reads=described.task.reads,
        variant=variant,
        variants=tuple(variants),
        settings=tuple(
            Setting(path, kind, value, text)
            for path, value in recipes.leaves(tree)
            if path not in ("family", "variant")
            for kind, text in [_defined(recipe, path)]
        ),
    )


def _defined(recipe: Any, path: str) -> tuple[str, str]:
    """Type and help of the setting at a path."""
    import models
    from pipelines import recipe as recipes
    from pipelines.recipe_sections import Optim

    first, _, rest = path.partition(".")
    family = models.get(recipe.family)
    if not rest:
        return attributes(recipes.Recipe).get(first, ("", ""))
    if first == "model":
        return attributes(type(family.variants[recipe.variant])).get(rest, ("", ""))
    if first == "augment":
        return attributes(family.task.augment_settings).get(rest, ("", ""))
    if first == "optim":
        return attributes(Optim).get(rest.rpartition(".")[2], ("", ""))
    kind = recipes.Recipe.model_fields[first].annotation
    return attributes(kind).get(rest, ("", "")) if isinstance(kind, type) else ("", "")


def attributes(kind: type[Any]) -> dict[str, tuple[str, str]]:
    """Name -> (type, help) of the annotated attributes of a class and its bases. The help is the
    string below the attribute, or its sentence in the docstring of the class."""
    if kind in _ATTRIBUTES:
        return _ATTRIBUTES[kind]
    types: dict[str, tuple[str, str]] = {}
    for each in reversed(kind.mro()):
        if each.__module__.startswith("pydantic"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError):  # a class of the interpreter, or one without a source
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for node, below in zip(body, [*body[1:], None]):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
                text = _string(below) or _from_class(each.__doc__ or "", name)
                types[name] = (_type(ast.unparse(node.annotation)), text)
    _ATTRIBUTES[kind] = types
    return types


_ATTRIBUTES: dict[type[Any], dict[str, tuple[str, str]]] = {}
"""Reading a class's source parses its whole module, which takes a tenth of a second."""


def _string(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


def _from_class(docstring: str, name: str) -> str:
    """The sentence of a class's docstring that begins with `name`."""
    text = " ".join(docstring.split())
    match = re.search(rf"`{name}`(?:(?:, | and )`\w+`)*:? (.*?\.)(?= |$)", text)
    return match[1][0].upper() + match[1][1:] if match else ""


def _type(annotation: str) -> str:
    """A type annotation as readable text: Literal["a", "b"] becomes a | b."""
    literal = re.compile(r"Literal\[([^\]]*)\]")
    return literal.sub(lambda m: m[1].replace("'", "").replace(", ", " | "), annotation)
