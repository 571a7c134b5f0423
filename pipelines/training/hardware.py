"""What this machine is, and whether its memory was too small.

In: nothing, or an error. Out: one line for measured results and a model's lineage; yes or no.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe() -> str:
    """This machine: cores, processor, GPUs."""
    import torch

    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores of {model}, {', '.join(gpus) if gpus else 'no GPU'}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the CPU or of a GPU, could not be allocated."""
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
