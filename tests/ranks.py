"""Runs a function as N gloo ranks, each a process; or, as a program, one of these ranks.

    run(module:function, size, payload) -> [what rank 0 gave, what rank 1 gave, …]

The function takes (world, payload) and gives plain JSON. What a rank raises as a TesseraError comes
back as {"error": its text}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(file: Path, function: str, size: int, payload: dict[str, Any]) -> list[Any]:
    with tempfile.TemporaryDirectory() as scratch:
        told = json.dumps({"file": str(file), "function": function, "payload": payload})
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(size), f"{scratch}/meeting", told],
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                text=True,
            )
            for rank in range(size)
        ]
        answers = [process.communicate(timeout=120)[0] for process in processes]
    assert all(p.returncode == 0 for p in processes), answers
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def main(rank: int, size: int, meeting: str, told: dict[str, Any]) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    from models.core.errors import TesseraError
    from pipelines.ports import World

    torch.set_num_threads(1)
    if size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size
        )
    spec = importlib.util.spec_from_file_location("work", told["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        answer = getattr(module, told["function"])(World(rank, size), told["payload"])
    except TesseraError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
    if size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
