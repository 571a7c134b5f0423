"""Memory for decoded images that the ranks of one machine have together.

In: the `World`, and how many samples. Out: the memory, the same for all ranks of a machine. Must not
know what is decoded into it. The name of the memory's file is taken away as soon as all have opened
it, so nothing stays behind, however the ranks end.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from models.core.errors import TesseraError
from models.core.family import DataSpec
from pipelines.data.loading import pixel_cache
from pipelines.data.loading.pixel_cache import SharedPixelBuffer
from pipelines.interfaces import World
from pipelines.training import distributed


def share_pixels(samples: int, spec: DataSpec, world: World) -> SharedPixelBuffer | None:
    """Called by all ranks. None where a rank is alone on its machine, or where there is no room:
    it then keeps what it decodes for itself."""
    machines = distributed.everyones(_machine(), world)
    mine = [rank for rank, machine in enumerate(machines) if machine == machines[world.rank]]
    makes = len(mine) > 1 and world.rank == mine[0]
    made = pixel_cache.create(samples, spec) if makes else None
    paths = distributed.everyones(str(made.path) if made and made.path else None, world)
    path = paths[mine[0]]
    if made is None and path is not None:
        with suppress(TesseraError):  # containers of one machine may not see each other's files
            made = pixel_cache.open_file(Path(path), samples, spec)
    distributed.everyones(None, world)  # collective: all have it open
    if made is not None and makes:
        made.unlink()
    return made


def _machine() -> str:
    """A name that two ranks have in common where they run under one kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
