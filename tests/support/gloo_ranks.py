"""Runs a function as N gloo ranks, each a process; or, as a program, one of these ranks.

    run(file, function, size, payload) -> [what rank 0 gave, what rank 1 gave, …]

The function takes (world, payload) and gives plain JSON. What a rank raises as a TesseraError comes
back as {"error": its text}. The processes are kept for the next call: to start one and to import
torch takes longer than most of what they are asked. One that fails ends them all.
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
ANSWER = "answer: "
_processes: list[subprocess.Popen[str]] = []


def run(file: Path, function: str, size: int, payload: dict[str, Any]) -> list[Any]:
    while len(_processes) < size:
        _processes.append(_start())
    called = _processes[:size]
    with tempfile.TemporaryDirectory() as scratch:
        asked = {"file": str(file), "function": function, "payload": payload, "size": size}
        for rank, process in enumerate(called):
            told = {**asked, "rank": rank, "meeting": f"{scratch}/meeting"}
            assert process.stdin is not None
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()
        with ThreadPoolExecutor(size) as threads:
            answers = [threads.submit(_answer, process) for process in called]
            wait(answers, timeout=LIMIT_SECONDS, return_when=FIRST_EXCEPTION)
            if not all(answer.done() and not answer.exception() for answer in answers):
                end()  # what waits for them in vain ends, too
    return [answer.result() for answer in answers]


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


def _answer(process: subprocess.Popen[str]) -> Any:
    """What it says; what the libraries print before is nothing."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER))
    raise ChildProcessError("a rank ended or didn't answer in time")


def serve() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        told = json.loads(line)
        if told["size"] > 1:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{told['meeting']}",
                rank=told["rank"],
                world_size=told["size"],
            )
        print(ANSWER + json.dumps(_call(told)), flush=True)
        if told["size"] > 1:
            torch.distributed.destroy_process_group()


def _call(told: dict[str, Any]) -> Any:
    from models.core.errors import TesseraError
    from pipelines.interfaces import World

    spec = importlib.util.spec_from_file_location("work", told["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return getattr(module, told["function"])(World(told["rank"], told["size"]), told["payload"])
    except TesseraError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    serve()
