"""Runs a program in a new process that has loaded torch already.

    run(program, *arguments, stdin=b"") -> what `subprocess.run` returns, with bytes

It does what `python -c PROGRAM ARGUMENTS` does, in the folder of the project. The process is forked
from one that only loads libraries and waits: each of them would take two seconds of CPU to load
torch. Programs that check what is loaded need a process of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 120
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch", "torch._dynamo", "torchvision", "pipelines.data.packing.pack"]
)


def run(program: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Raises TimeoutExpired after `LIMIT_SECONDS`."""
    with (
        tempfile.NamedTemporaryFile() as given,
        tempfile.NamedTemporaryFile() as out,
        tempfile.NamedTemporaryFile() as err,
    ):
        given.write(stdin)
        given.flush()
        names = (given.name, out.name, err.name)
        process = context.Process(target=_run, args=(program, arguments, names))
        process.start()
        process.join(LIMIT_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(program, LIMIT_SECONDS)
        return subprocess.CompletedProcess(program, process.exitcode, out.read(), err.read())


def _run(program: str, arguments: tuple[str, ...], names: tuple[str, str, str]) -> None:
    for number, (name, flags) in enumerate(zip(names, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
        os.dup2(os.open(name, flags), number)
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(ROOT)
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
