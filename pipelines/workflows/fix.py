"""Makes a corrected version of a packed data set.

In: a packed data set, and a corrections file. Out: a `PackedData`, which the other workflows accept
as their data set. Must not print, nor read the environment.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from pipelines.workflows.pack import PackedData

if TYPE_CHECKING:
    from pipelines.interfaces import Listener
    from pipelines.workflows.context import Context


def fix(
    data: str | os.PathLike[str],
    corrections: str | os.PathLike[str],
    *,
    to: str | os.PathLike[str],
    name: str | None = None,
    allow_empty_class: bool = False,
    progress: bool | Listener = True,
    context: Context | None = None,
) -> PackedData:
    """Writes a new version of a data set with corrections; the old one stays as it is.

    Args:
        data: A packed data set: a folder, an address or what `pack` returned.
        corrections: A CSV file with the columns `sample` and `action`, and optionally `split` and
            `class`. The action is a class, or `drop` to remove the sample; for tasks other than
            classification only `drop`.
        to: The new folder, or an address.
        name: Name of the new data set; by default that of the old one.
        allow_empty_class: Whether a class may lose all its images of a split. A class without any
            image is removed from the list of classes.
        progress: True for a display on stderr, False for none, or a `Listener`.
        context: The settings of the cache; from the environment by default.

    Raises TesseraError for a correction that is unknown, changes nothing or contradicts another,
    and if `to` is not empty.
    """
    from pipelines.data.packing import fix as packing
    from pipelines.storage.base import absolute_location
    from pipelines.visuals.progress import show_progress
    from pipelines.workflows import services
    from pipelines.workflows.context import Context

    started = time.monotonic()
    services.apply_settings(context or Context.from_environment())
    with show_progress(progress) as listener:
        card = packing.fix(
            os.fspath(data),
            corrections,
            os.fspath(to),
            name=name,
            allow_empty=allow_empty_class,
            progress=lambda done, total: listener(
                {"kind": "advance", "done": done, "total": total, "unit": "images"}
            ),
            notify=lambda text: listener({"kind": "message", "text": text}),
        )
    return PackedData(absolute_location(os.fspath(to)), card, time.monotonic() - started)
