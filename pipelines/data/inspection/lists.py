"""The lists that a pack leaves beside the shards: near duplicates, copies, rejected samples, files.

In: a folder or an address. Out: rows. Must not know the images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field, ValidationError

from models.core.errors import TesseraError, value_problem
from pipelines.data.packing import account as account_file
from pipelines.data.packing.account import Account
from pipelines.storage.open import open_storage

NEAR_DUPLICATES, REJECTED, COPIES = "near_duplicates.jsonl", "rejected.jsonl", "copies.jsonl"
NAMED_REASONS = 10


class Side(BaseModel):
    """One of two near duplicates."""

    split: str
    key: str
    origin: str = ""


class PairRow(BaseModel):
    """A line of `near_duplicates.jsonl`; the distance is in bits of the fingerprint."""

    left: Side
    right: Side
    distance: int = 0


class RejectedRow(BaseModel):
    """A line of `rejected.jsonl`."""

    key: str
    origin: str = ""
    reason: str
    detail: str = ""


class CopyRow(BaseModel):
    """One of several images with the same pixels. `label` is the name of its class, empty for a
    task without."""

    key: str
    origin: str = ""
    label: str = Field("", alias="class")


class CopyGroup(BaseModel):
    """A line of `copies.jsonl`: images of one split with the same pixels."""

    split: str
    images: list[CopyRow]

    @property
    def in_conflict(self) -> bool:
        """Whether the same pixels have several classes."""
        return len({image.label for image in self.images}) > 1

    def __str__(self) -> str:
        by_class = {image.label: image.origin or image.key for image in self.images}
        return ", ".join(f"{path} is {name}" for name, path in by_class.items())


class _AccountFile(BaseModel):
    """The content of `account.json`."""

    files: int
    images: int = 0
    labels: int = 0
    documents: int = 0
    allowed: int = 0
    others: dict[str, int] = {}


def count_reasons(rows: Iterable[RejectedRow]) -> list[tuple[str, int]]:
    """(reason, count), the most frequent first; rare reasons are summed up as one."""
    counted = Counter(row.reason for row in rows)
    ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[NAMED_REASONS:])
    return ranked[:NAMED_REASONS] + ([("for other reasons", rest)] if rest else [])


def describe_copies(groups: Sequence[CopyGroup], shown: int) -> Iterator[tuple[str, str]]:
    """Name and text of the facts about copies; of conflicts the first `shown`."""
    if not groups:
        return
    count = sum(len(group.images) - 1 for group in groups)
    yield "copies", f"{count:,} image{'s' * (count != 1)} within a split; see {COPIES}"
    conflicts = [group for group in groups if group.in_conflict]
    if conflicts:
        listed = "; ".join(map(str, conflicts[:shown])) + ("; …" if len(conflicts) > shown else "")
        times = f"{len(conflicts):,} time{'s' * (len(conflicts) != 1)}"
        yield "conflicts", f"{times} the same pixels have different classes: {listed}"


def read_rejected(where: str | Path) -> list[RejectedRow]:
    """The samples that were left out when packing; may be empty."""
    return _read_lines(where, REJECTED, RejectedRow)


def read_pairs(where: str | Path) -> list[PairRow]:
    """The near duplicates across splits, the nearest first."""
    rows = _read_lines(where, NEAR_DUPLICATES, PairRow)
    return sorted(rows, key=lambda row: (row.distance, row.left.key, row.right.key))


def read_copies(where: str | Path) -> list[CopyGroup]:
    """The images of one split with the same pixels, those with several classes first."""
    rows = _read_lines(where, COPIES, CopyGroup)
    return sorted(rows, key=lambda row: not row.in_conflict)


def read_account(where: str | Path) -> Account | None:
    """What became of the files of the source; None for a set without an account."""
    storage = open_storage(where)
    if storage.size(account_file.FILE) is None:
        return None
    try:
        found = _AccountFile.model_validate_json(storage.read(account_file.FILE))
    except ValidationError as error:
        raise _unreadable(f"{storage.where}/{account_file.FILE}", error) from None
    return Account(folder="", **found.model_dump())


Row = TypeVar("Row", bound=BaseModel)


def _read_lines(where: str | Path, file: str, kind: type[Row]) -> list[Row]:
    storage = open_storage(where)
    if storage.size(file) is None:
        return []
    rows = []
    for number, line in enumerate(storage.read(file).splitlines(), 1):
        try:
            rows.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise _unreadable(f"{storage.where}/{file}, line {number}", error) from None
    return rows


def _unreadable(where: str, error: ValidationError) -> TesseraError:
    problem = value_problem(error.errors()[0]["msg"])
    return TesseraError(
        f"{where} can't be read: {problem}", hint="fetch or pack the data set again"
    )
