"""Memory for decoded images that the ranks of one machine share.

In: the `World`, and how many samples. Out: a buffer, the same for all ranks of a machine. Must not
know what is decoded into it. The buffer's file is unlinked as soon as all ranks have opened it, so
nothing is left behind, however the ranks end.
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
    """Called by all ranks. Returns None if a rank is alone on its machine, or if there is not
    enough memory: it then caches in memory of its own."""
    machines = distributed.all_gather(_machine(), world)
    mine = [rank for rank, machine in enumerate(machines) if machine == machines[world.rank]]
    creates = len(mine) > 1 and world.rank == mine[0]
    buffer = pixel_cache.create(samples, spec) if creates else None
    paths = distributed.all_gather(str(buffer.path) if buffer and buffer.path else None, world)
    path = paths[mine[0]]
    if buffer is None and path is not None:
        with suppress(TesseraError):  # containers on one machine may not see each other's files
            buffer = pixel_cache.open_file(Path(path), samples, spec)
    distributed.all_gather(None, world)  # collective: all ranks have opened it
    if buffer is not None and creates:
        buffer.unlink()
    return buffer


def _machine() -> str:
    """A name that two ranks share if they run on the same kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
