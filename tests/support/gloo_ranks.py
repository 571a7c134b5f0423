"""Runs a function on N gloo ranks, each a process; or, as a program, is one of these ranks.

    run(file, function, size, payload) -> [result of rank 0, result of rank 1, …]

The function takes (world, payload) and returns plain JSON. A TesseraError in a rank is returned as
{"error": its text}. The processes are kept for the next call, because starting one and importing
torch takes longer than most functions. If one fails, all are ended.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 120
RESULT = "result: "
_processes: list[subprocess.Popen[str]] = []


def run(file: Path, function: str, size: int, payload: dict[str, Any]) -> list[Any]:
    while len(_processes) < size:
        _processes.append(_start())
    used = _processes[:size]
    with tempfile.TemporaryDirectory() as scratch:
        request = {"file": str(file), "function": function, "payload": payload, "size": size}
        for rank, process in enumerate(used):
            of_rank = {**request, "rank": rank, "meeting": f"{scratch}/meeting"}
            assert process.stdin is not None
            process.stdin.write(json.dumps(of_rank) + "\n")
            process.stdin.flush()
        with ThreadPoolExecutor(size) as threads:
            results = [threads.submit(_result, process) for process in used]
            wait(results, timeout=LIMIT_SECONDS, return_when=FIRST_EXCEPTION)
            if not all(result.done() and not result.exception() for result in results):
                end()  # the other ranks would wait forever for the one that failed
    return [result.result() for result in results]


def end() -> None:
    for process in _processes:
        process.kill()
        process.wait()
    _processes.clear()


atexit.register(end)


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        bufsize=1,
    )


def _result(process: subprocess.Popen[str]) -> Any:
    """The next result that the process prints; other output is skipped."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    raise ChildProcessError("a rank ended, or returned no result in time")


def serve() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if request["size"] > 1:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{request['meeting']}",
                rank=request["rank"],
                world_size=request["size"],
            )
        print(RESULT + json.dumps(_call(request)), flush=True)
        if request["size"] > 1:
            torch.distributed.destroy_process_group()


def _call(request: dict[str, Any]) -> Any:
    from models.core.errors import TesseraError
    from pipelines.interfaces import World

    spec = importlib.util.spec_from_file_location("work", request["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    world = World(request["rank"], request["size"])
    try:
        return getattr(module, request["function"])(world, request["payload"])
    except TesseraError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    serve()
