"""References to registered models, in every verb and in Python: `NAME`, `NAME/2`, `NAME@alias`.

In: the text, with or without `models:/` before it. Out: a `ModelReference`, and the version that it
names. `NAME` alone is the newest version.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.core.errors import UsageError

if TYPE_CHECKING:
    from pipelines.interfaces import Registry, Version

GRAMMAR = "NAME, NAME/2 or NAME@alias"


@dataclass(frozen=True)
class ModelReference:
    """A model's name, with a version's number, an alias, or neither."""

    name: str
    number: int | None = None
    alias: str = ""

    def __str__(self) -> str:
        if self.alias:
            return f"{self.name}@{self.alias}"
        return self.name if self.number is None else f"{self.name}/{self.number}"

    def resolve(self, registry: Registry) -> Version:
        """The version in the registry. Raises TesseraError or UsageError, which lists what exists,
        if there is no such version."""
        if self.alias or self.number is not None:
            return registry.version(self.name, self.alias or self.number or 0)
        versions = registry.versions(self.name)
        return versions[-1] if versions else registry.version(self.name, 1)


def parse(text: str) -> ModelReference:
    """A reference from its text. Raises UsageError if the text has another form."""
    short = unicodedata.normalize("NFC", text.removeprefix("models:/"))
    name, slash, number = short.partition("/")
    if slash:
        if not name or not (number.isascii() and number.isdigit() and int(number)):
            raise _wrong(text)
        return ModelReference(name, int(number))
    name, at, alias = short.partition("@")
    if not name or (at and not alias):
        raise _wrong(text)
    return ModelReference(name, alias=alias)


def of(model: str | Version) -> ModelReference:
    """A reference from its text or from a version. Raises as `parse`."""
    return parse(model) if isinstance(model, str) else ModelReference(model.name, model.number)


def resolve(registry: Registry, model: str | Version) -> Version:
    """The version that a text names; of a version, the same one with its current tags."""
    return of(model).resolve(registry)


def _wrong(text: str) -> UsageError:
    return UsageError(f"{text!r} does not name a model", hint=f"write {GRAMMAR}")
