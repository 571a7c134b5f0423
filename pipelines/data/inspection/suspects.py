"""Finds samples whose label is probably wrong, and writes a draft of their corrections.

In: the probabilities that a trained model gives to each class, and the labels. Out: suspects, the
likeliest first. Must not know where the probabilities come from.

This is confident learning (Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty
in Dataset Labels", 2021). The threshold of a class is the mean probability that the model gives to
that class on the samples labelled so. A sample belongs confidently to a class if its probability
reaches the threshold; of several such classes, to the most probable one. It is a suspect if that is
another class than its label, so if it is off the diagonal of the confident joint, and more probable
than its label.

    N samples, K classes
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from models.core.errors import TesseraError
from pipelines.data.images import make_key

Array = np.ndarray[Any, Any]
COLUMNS = ("sample", "split", "class", "suggested", "margin", "action")
"""Of a draft; `packing/corrections.py` reads it."""


@dataclass(frozen=True)
class Suspect:
    """A sample whose label is probably wrong.

    Args:
        split, key: Which sample.
        label: The name of its class.
        suggested: The class that it probably belongs to.
        margin: How much more probable that class is, above 0 and at most 1.
    """

    split: str
    key: str
    label: str
    suggested: str
    margin: float

    @property
    def name(self) -> str:
        """The sample as the user knows it: the path of its file without suffix, if that can be read
        from the key."""
        path = unquote(self.key)
        return path if make_key(path) == self.key else self.key


class Candidate(NamedTuple):
    """The position of a suspect, its suggested class index, and its margin."""

    position: int
    label: int
    margin: float


def find_suspects(probabilities: Array, labels: Array) -> list[Candidate]:
    """The suspects, that of the largest margin first.

    Args:
        probabilities: float (N, K).
        labels: int64 (N,).
    """
    count, classes = probabilities.shape
    rows = np.arange(count)
    own = probabilities[rows, labels].astype(np.float64)
    sizes = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=own, minlength=classes)
    # A class that no sample has is never suggested.
    thresholds = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.inf)
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    best = confident.argmax(axis=1)
    margins = probabilities[rows, best].astype(np.float64) - own
    found = np.flatnonzero((confident.max(axis=1) >= 0) & (best != labels) & (margins > 0))
    order = found[np.argsort(-margins[found], kind="stable")]
    return [Candidate(int(at), int(best[at]), float(margins[at])) for at in order]


def write_draft(file: Path, suspects: Iterable[Suspect]) -> None:
    """Writes a corrections file with a row for each suspect and no action, so that nothing is
    corrected before somebody has looked at it. Raises TesseraError if the file exists."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in suspects:
        writer.writerow([one.name, one.split, one.label, one.suggested, f"{one.margin:.3f}", ""])
    try:
        with file.open("x", encoding="utf-8", newline="") as stream:
            stream.write(out.getvalue())
    except FileExistsError:
        raise file_exists(file) from None
    except OSError as error:
        raise TesseraError(f"{file} can't be written: {error.strerror}") from None


def file_exists(file: Path) -> TesseraError:
    """The error for a draft that would replace a file."""
    return TesseraError(f"{file} exists already", hint="name a new file: it may have actions")
