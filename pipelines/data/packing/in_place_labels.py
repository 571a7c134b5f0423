"""Labels in existing WebDataset shards.

In: the bytes of a label member. Out: a number or a name, and later the class index of each. Must
not know tars. JSON is parsed safely, and nothing is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.core.errors import TesseraError
from pipelines.data.safe_parsers import read_json
from pipelines.data.sample_error import SampleError

_MAX_TEXT_BYTES = 1 << 10
_MAX_JSON_BYTES = 1 << 20
_MAX_NAME = 200
_MAX_DIGITS = 9


@dataclass(frozen=True)
class Label:
    """The extension of the member that has the class, and for JSON its field."""

    extension: str
    field: str = ""

    @property
    def limit(self) -> int:
        """Most bytes of the member."""
        return _MAX_JSON_BYTES if self.field else _MAX_TEXT_BYTES


def parse_label(data: bytes, where: str, label: Label, classes: Sequence[str] = ()) -> int | str:
    """A class number, or a name. Raises SampleError for what is neither, and with `classes` for
    what is none of them."""
    value = _field(data, where, label.field) if label.field else _text(data, where)
    if isinstance(value, str):
        value = _number_or_name(value, where)
    if classes:
        if isinstance(value, int) and str(value) not in classes:
            known = value < len(classes)
        else:
            known = str(value) in classes
        if not known:
            raise SampleError(
                "unknown class", f"{where} says {value!r}, which is none of the classes"
            )
    return value


def settle_classes(
    labels: Mapping[str, Sequence[int | str]], classes: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """The classes, and the index of each label. `labels` are by shard. Without `classes` they are
    the numbers or names that occur, sorted; both at once is a TesseraError."""
    found = {label: path for path, of_shard in labels.items() for label in of_shard}
    if set(found) <= {""}:
        return (), {}
    if classes:
        known: dict[int | str, int] = {name: at for at, name in enumerate(classes)}
        return classes, {
            label: known.get(str(label), label if isinstance(label, int) else -1) for label in found
        }
    names = sorted(label for label in found if isinstance(label, str))
    numbers = sorted(label for label in found if isinstance(label, int))
    if names and numbers:
        raise TesseraError(
            f"some labels are numbers and some are names: {numbers[0]} in shard "
            f"{found[numbers[0]]}, {names[0]!r} in shard {found[names[0]]}",
            hint="say what the classes are: --option classes=NAME,NAME,…",
        )
    ordered: list[int | str] = [*numbers, *names]
    return tuple(map(str, ordered)), {label: at for at, label in enumerate(ordered)}


def _field(data: bytes, where: str, field: str) -> int | str:
    try:
        value = read_json(data, where, _MAX_JSON_BYTES)
    except TesseraError as error:
        raise SampleError("unreadable label", error.message) from None
    found = value.get(field) if isinstance(value, dict) else None
    if isinstance(found, str):
        return found
    if type(found) is int and 0 <= found < 10**_MAX_DIGITS:
        return found
    raise SampleError(
        "unknown class", f"{where} has no class in its field {field!r}: {found!r:.80}"
    )


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError:
        raise SampleError("unknown class", f"{where} is not UTF-8: {data[:40]!r}") from None


def _number_or_name(text: str, where: str) -> int | str:
    if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS:
        return int(text)
    looks_like_number = text.lstrip("+-").replace(".", "", 1).isdigit()
    if not text or looks_like_number or len(text) > _MAX_NAME or not text.isprintable():
        raise SampleError("unknown class", f"{where} says {text[:80]!r}, which is no class")
    return text
