"""A machine on a cable to this one: a Linux namespace with a network of its own. It runs programs
that see this machine as any other machine on its network does, and sends through it what is for
other addresses. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESS = "10.79.0.1"
"""Of this machine, while there is a neighbour."""
_OWN, _LINK = "10.79.0.2", "tessera-test"
_LISTENS = "0A"


@contextmanager
def neighbour() -> Iterator[list[str]]:
    """The first words of a command that runs there."""
    held = subprocess.Popen(["unshare", "--net", "sleep", "900"], start_new_session=True)
    enter = ["nsenter", "-t", str(held.pid), "-n"]
    try:
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{held.pid}/ns/net").readlink() == own:
            time.sleep(0.01)
        _call("ip", "link", "add", _LINK, "type", "veth", "peer", "eth0", "netns", str(held.pid))
        _call("ip", "addr", "add", f"{ADDRESS}/24", "dev", _LINK)
        _call("ip", "link", "set", _LINK, "up")
        _call(*enter, "ip", "addr", "add", f"{_OWN}/24", "dev", "eth0")
        _call(*enter, "ip", "link", "set", "eth0", "up")
        _call(*enter, "ip", "route", "add", "default", "via", ADDRESS)
        yield enter
    finally:
        held.kill()  # the cable ends with the namespace
        held.wait()


def missing() -> str:
    """Why there can be no neighbour here; empty if there can."""
    tools = [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool)]
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a neighbour of namespaces needs Linux and root"
    return f"{tools[0]} is not installed (make lab)" if tools else ""


def listening() -> set[int]:
    """The TCP ports on which this machine listens for others than itself."""
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            loopback = address in ("0100007F", "00000000000000000000000001000000")
            if state == _LISTENS and not loopback:
                found.add(int(port, 16))
    return found


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
