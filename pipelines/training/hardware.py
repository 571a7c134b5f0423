"""A description of this machine.

In: nothing. Out: one line, for measured results and a model's lineage.
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
