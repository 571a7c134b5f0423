"""Runs a function on N gloo ranks, each a process.

    run(file, function, size, payload) -> [result of rank 0, result of rank 1, …]

The function takes (world, payload) and returns plain JSON. A TesseraError in a rank is returned as
{"error": its text}. The processes are kept for the next call. If one fails, all are ended.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fresh_process

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 120
_ranks: list[tuple[BaseProcess, Connection]] = []


def run(file: Path, function: str, size: int, payload: dict[str, Any]) -> list[Any]:
    while len(_ranks) < size:
        _ranks.append(_start())
    connections = [connection for _, connection in _ranks[:size]]
    with tempfile.TemporaryDirectory() as scratch:
        request = {"file": str(file), "function": function, "payload": payload, "size": size}
        for rank, connection in enumerate(connections):
            of_rank = {**request, "rank": rank, "meeting": f"{scratch}/meeting"}
            connection.send(json.dumps(of_rank))
        with ThreadPoolExecutor(size) as threads:
            results = [threads.submit(_result, connection) for connection in connections]
            wait(results, timeout=LIMIT_SECONDS, return_when=FIRST_EXCEPTION)
            if not all(result.done() and not result.exception() for result in results):
                end()  # the other ranks would wait forever for the one that failed
    return [result.result() for result in results]


def end() -> None:
    for process, _ in _ranks:
        process.kill()
        process.join()
    _ranks.clear()


atexit.register(end)


def _start() -> tuple[BaseProcess, Connection]:
    ours, theirs = Pipe()
    process = fresh_process.context.Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()
    return process, ours


def _result(connection: Connection) -> Any:
    try:
        return json.loads(connection.recv())
    except EOFError:
        raise ChildProcessError("a rank ended, or returned no result in time") from None


def serve(connection: Connection) -> None:
    """What each rank does: runs functions until the other end is closed."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with contextlib.suppress(EOFError):
        while True:
            _serve_one(connection, json.loads(connection.recv()))


def _serve_one(connection: Connection, request: dict[str, Any]) -> None:
    import torch

    if request["size"] > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{request['meeting']}",
            rank=request["rank"],
            world_size=request["size"],
        )
    connection.send(json.dumps(_call(request)))
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
