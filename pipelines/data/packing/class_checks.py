"""What the classes of a packed data set have, before it is finished.

In: how many images or objects of each class were planned and packed. Out: an error for a class that
lost all it had, and lines about classes that are hard to learn. Must not know shards.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from models.core.errors import TesseraError
from pipelines.data.card import SPLITS, Split
from pipelines.data.packing.formats import SHOWN_CLASSES
from pipelines.data.sources import Source

_BETWEEN = re.compile(r"[\s_-]+")
_ZEROS = re.compile(r"^([0-9]+)\.0*$", re.ASCII)
FEW = 5
"""A class with fewer train images is named."""

Counts = Mapping[Split, Mapping[str, int]]


def count_planned(source: Source, planned: Iterable[tuple[Split, int | None]]) -> Counts:
    """Images of each class that each split was planned to have, where images have classes."""
    found: dict[Split, Counter[str]] = {split: Counter() for split in SPLITS}
    for split, label in planned:
        if label is not None and 0 <= label < len(source.classes):
            found[split][source.classes[label]] += 1
    return found


def check_classes(
    source: Source,
    name: str,
    planned: Counts,
    counts: Counts,
    unseen: frozenset[str],
    notify: Callable[[str], None],
) -> None:
    """Refuses a class that lost all images of a split where each image has a class; for other
    tasks, a class that no train image has is named. Unseen classes are meant to have none."""
    for one, other in find_alike(source.classes).items():
        notify(f"the classes {one!r} and {other!r} are two, and have nearly the same name")
    if source.task == "classification":
        _check_lost(name, planned, counts, unseen)
        _report_few(counts["train"], unseen, notify)
        return
    missing: dict[str, list[str]] = {}
    for label, count in counts["train"].items():
        if not count:
            others = [split for split in SPLITS if counts[split][label]]
            missing.setdefault(" and ".join(others), []).append(label)
    for splits, labels in missing.items():
        also = f"; only {splits} images do" if splits else ""
        notify(f"no train image has {_name(labels)}{also}")


def _name(labels: Sequence[str]) -> str:
    """The number of classes, and the names of the first ones."""
    if len(labels) == 1:
        return f"the class {labels[0]!r}"
    return f"any of {len(labels):,} classes ({_shorten(labels)})"


def find_alike(classes: Sequence[str]) -> dict[str, str]:
    """Class -> an earlier one whose name differs only in case, spaces, hyphens and underscores, or
    is the same number, as 1 and 1.0."""
    first: dict[str, str] = {}
    alike = {}
    for name in classes:
        plain = _BETWEEN.sub(" ", unicodedata.normalize("NFKC", name).casefold()).strip()
        plain = _ZEROS.sub(r"\1", plain)
        if plain and first.setdefault(plain, name) != name:
            alike[name] = first[plain]
    return alike


def _check_lost(name: str, planned: Counts, counts: Counts, unseen: frozenset[str]) -> None:
    for split in SPLITS:
        for label, count in counts[split].items():
            wanted = label not in unseen if split == "train" else planned[split].get(label)
            if wanted and not count:
                raise TesseraError(
                    f"{name} has no {split} image of the class {label!r} left",
                    hint="see which were rejected, or remove the class",
                )


def _report_few(
    train: Mapping[str, int], unseen: frozenset[str], notify: Callable[[str], None]
) -> None:
    few = [f"{label} {count}" for label, count in train.items() if 0 < count < FEW]
    if few:
        notify(f"classes with fewer than {FEW} train images: {_shorten(few)}")
    if len(train) - len(unseen & set(train)) == 1:
        notify(f"all train images have the class {next(iter(train))}: there is nothing to learn")


def _shorten(texts: Sequence[str]) -> str:
    more = ", …" if len(texts) > SHOWN_CLASSES else ""
    return ", ".join(texts[:SHOWN_CLASSES]) + more
