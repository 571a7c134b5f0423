"""Where copies of remote shards may lie, as the user says it.

In: TESSERA_CACHE (a folder), TESSERA_CACHE_SIZE (as in 200GB) and XDG_CACHE_HOME. Out: the cache of
this process, which the driver tells the workers. Creates nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from models.core.errors import UsageError

_NAMES = ("TESSERA_CACHE", "TESSERA_CACHE_SIZE", "XDG_CACHE_HOME")


def apply() -> None:
    """Sets the cache where the user says anything of it. Raises UsageError for what is no size."""
    folder, size, home = (os.environ.get(name) or "" for name in _NAMES)
    if not (folder or size or home):
        return
    from dataclasses import replace

    from pipelines.storage.base import current_cache, use_cache

    settings = current_cache()
    if folder:
        settings = replace(settings, folder=Path(folder).expanduser().absolute())
    elif home:
        settings = replace(settings, folder=Path(home).absolute() / "tessera" / "shards")
    if size:
        settings = replace(settings, limit_bytes=parse_size(size))
    use_cache(settings)


def parse_size(text: str) -> int:
    """Bytes from a number with KB, MB, GB, TB, the same with i (KiB), or without a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(I?)B?", text.strip().upper())
    if not match:
        raise UsageError(f"TESSERA_CACHE_SIZE={text} is no size", hint="as in 200GB")
    base, power = 1024 if match[3] else 1000, " KMGT".index(match[2] or " ")
    return int(float(match[1]) * base**power)
