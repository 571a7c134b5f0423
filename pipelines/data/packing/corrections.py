"""Corrections of a packed data set, read from a table.

In: a CSV file with a row for each sample, and the index of each split. Out: for each split, the
samples that change and how. Must not know how the new data set is written.

    sample,split,class,action
    cat/12.jpg,,,dog           gets the class dog
    cat/13,train,cat,drop      is removed; the row is refused if it isn't in train, or isn't a cat
    cat/14,,,                  no action: nothing is changed

A sample is named by its key, or by the file that it was packed from. `split`, `class` and the
columns of `INFORMATION` may be missing.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from models.core.errors import TesseraError, UsageError, unknown
from pipelines.data.card import ANNOTATION_EXTENSIONS, SPLITS, Card, Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.tables import parse_rows
from pipelines.data.index import Index
from pipelines.data.sources import read_file

SAMPLE, SPLIT, CLASS, ACTION = "sample", "split", "class", "action"
INFORMATION = ("suggested", "margin")
"""Columns of a draft that help to choose the action; not read."""
DROP = "drop"
CLASS_PREFIX, SAMPLE_PREFIX = "class:", "sample:"
"""Before the name of a class, and before `drop`, where a class is named "drop"."""
_SEARCHED = 100_000
"""Keys that are compared with an unknown name."""


class Row(NamedTuple):
    """A row with an action. `where` names its file and its line in messages."""

    where: str
    sample: str
    split: str
    name: str
    action: str


@dataclass(frozen=True)
class Corrections:
    """A corrections file: its rows with an action, the number of rows without one, its checksum."""

    rows: tuple[Row, ...]
    without_action: int
    sha256: str


class Change(NamedTuple):
    """A sample's new class index; None if it is dropped."""

    label: int | None


class _Found(NamedTuple):
    split: Split
    number: int
    label: int


def read_corrections(path: str | os.PathLike[str]) -> Corrections:
    """Reads a corrections file. Raises TesseraError that names file and line if it is damaged, has
    other columns, or has no row with an action."""
    file = Path(path)
    data = read_file(file, str(file))
    listed = parse_rows(data, str(file))
    header = [cell.strip().lower() for cell in next(listed, [])]
    _check_header(header, str(file))
    rows, without_action, line = [], 0, 1
    for cells in listed:
        line += 1
        where = f"{file}, line {line}"
        line += sum(cell.count("\n") for cell in cells)
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise TesseraError(
                f"{where}: {len(cells)} columns, the header has {len(header)}",
                hint="put quotes around text that contains the delimiter",
            )
        values = {name: cell.strip() for name, cell in zip(header, cells)}
        if not values[SAMPLE]:
            raise TesseraError(f"{where}: the sample is missing", hint="give its key or file name")
        if not values[ACTION]:
            without_action += 1
            continue
        columns = (values.get(name, "") for name in (SAMPLE, SPLIT, CLASS, ACTION))
        rows.append(Row(where, *columns))
    if not rows:
        raise TesseraError(
            f"{file} has no corrections: "
            + (f"no action in {without_action:,} rows" if without_action else "it has no rows"),
            hint=f"the column {ACTION} has the new class, or {DROP} to remove the sample",
        )
    return Corrections(tuple(rows), without_action, hashlib.sha256(data).hexdigest())


def _check_header(header: Sequence[str], where: str) -> None:
    known = (SAMPLE, SPLIT, CLASS, ACTION, *INFORMATION)
    for name in header:
        if name not in known or header.count(name) > 1:
            twice = "is there twice" if name in known else "is not known"
            raise TesseraError(
                f"{where}, line 1: the column {name!r} {twice}",
                hint=f"the columns are {', '.join(known[:4])}",
            )
    for name in (SAMPLE, ACTION):
        if name not in header:
            raise TesseraError(
                f"{where}, line 1: there is no column {name!r}, the header has "
                f"{', '.join(header) or 'nothing'}",
                hint=f"begin the file with the line: {SAMPLE},{ACTION}",
            )


def find_changes(
    rows: Sequence[Row], card: Card, indices: Mapping[Split, Index]
) -> dict[Split, dict[int, Change]]:
    """Split -> number of a sample -> its change.

    Raises TesseraError that names file and line for an unknown sample, split or class, for an
    action that the task doesn't have, that changes nothing, or that contradicts another.
    """
    changes: dict[Split, dict[int, Change]] = {split: {} for split in indices}
    lines: dict[tuple[Split, int], str] = {}
    known = _find_keys(rows, indices)
    for row in rows:
        change = _read_action(row, card)
        found = _find_sample(row, known, indices)
        _check_change(row, change, found, card)
        first = lines.setdefault((found.split, found.number), row.where)
        if first != row.where:
            raise TesseraError(
                f"{row.where}: {row.sample!r} has a correction already: {first}",
                hint="keep one of the two",
            )
        changes[found.split][found.number] = change
    return changes


def _read_action(row: Row, card: Card) -> Change:
    action, classes = row.action, card.classes
    if ANNOTATION_EXTENSIONS[card.task] != "cls":
        if action in (DROP, SAMPLE_PREFIX + DROP):
            return Change(None)
        raise UsageError(
            f"{row.where}: {action!r} is not possible for {card.task.replace('_', ' ')}: only "
            f"{DROP} is",
            hint="correct the labels in the source, and pack it again",
        )
    if action == DROP and DROP in classes:
        raise UsageError(
            f"{row.where}: {action!r} could be the class of that name",
            hint=f"write {CLASS_PREFIX}{DROP} for the class, {SAMPLE_PREFIX}{DROP} to remove the "
            "sample",
        )
    if action in (DROP, SAMPLE_PREFIX + DROP) and action not in classes:
        return Change(None)
    name = action if action in classes else action.removeprefix(CLASS_PREFIX)
    if name not in classes:
        error = unknown("class", name, [*classes, DROP])
        raise UsageError(f"{row.where}: {error.message}", hint=error.hint)
    return Change(classes.index(name))


def _check_change(row: Row, change: Change, found: _Found, card: Card) -> None:
    name = card.classes[found.label] if 0 <= found.label < len(card.classes) else ""
    if row.name and name and row.name != name:
        raise TesseraError(
            f"{row.where}: {row.sample!r} has the class {name!r}, not {row.name!r}",
            hint="the file was made for another version of the data set",
        )
    if change.label is not None and change.label == found.label:
        raise TesseraError(
            f"{row.where}: {row.sample!r} has the class {name!r} already",
            hint="remove the row, or leave its action empty",
        )


def candidates(sample: str) -> tuple[str, ...]:
    """The keys that a name may mean, the likeliest first: the name is a key, or a file's path with
    or without its suffix."""
    path = sample.replace("\\", "/").removeprefix("./")
    made = (sample, make_key(path), make_key(os.path.splitext(path)[0]))
    return tuple(dict.fromkeys(key for key in made if key))


def _find_keys(rows: Sequence[Row], indices: Mapping[Split, Index]) -> dict[str, list[_Found]]:
    """Key -> the samples that have it, for all keys that the rows may mean."""
    keys = {key for row in rows for key in candidates(row.sample) if key.isascii()}
    wanted = np.array(sorted(key.encode() for key in keys))
    known: dict[str, list[_Found]] = {}
    for split, index in indices.items():
        for shard, start in enumerate(index.starts[:-1].tolist()):
            found = index.rows(shard)
            for at in np.flatnonzero(np.isin(found["key"], wanted)).tolist():
                one = _Found(split, start + at, int(found["label"][at]))
                known.setdefault(found["key"][at].decode("ascii"), []).append(one)
    return known


def _find_sample(
    row: Row, known: Mapping[str, Sequence[_Found]], indices: Mapping[Split, Index]
) -> _Found:
    if row.split and row.split not in indices:
        error = unknown("split", row.split, [split for split in SPLITS if split in indices])
        raise UsageError(f"{row.where}: {error.message}", hint=error.hint)
    for key in candidates(row.sample):
        found = [one for one in known.get(key, ()) if row.split in ("", one.split)]
        if len(found) > 1:
            raise TesseraError(
                f"{row.where}: {row.sample!r} is in {' and '.join(one.split for one in found)}",
                hint=f"name one in the column {SPLIT}",
            )
        if found:
            return found[0]
    for key in candidates(row.sample):
        for one in known.get(key, ()):
            raise TesseraError(f"{row.where}: {row.sample!r} is in {one.split}, not in {row.split}")
    near = _nearest_key(candidates(row.sample)[-1], indices)
    hint = f"did you mean {unquote(near)!r}? " if near else ""
    raise TesseraError(
        f"{row.where}: there is no sample {row.sample!r}",
        hint=f"{hint}A sample is named by its key or its file, as on the page of tessera inspect",
    )


def _nearest_key(wanted: str, indices: Mapping[Split, Index]) -> str:
    best, left = "", _SEARCHED
    for index in indices.values():
        for shard in range(len(index.starts) - 1):
            keys = [key.decode("ascii", "replace") for key in index.rows(shard)["key"][:left]]
            left -= len(keys)
            best = next(iter(difflib.get_close_matches(wanted, [best, *keys], 1, 0.5)), best)
            if left <= 0:
                return best
    return best
