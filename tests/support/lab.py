"""Machines made of Linux namespaces: each has a network, a host name, processes and a disk of its
own, and reaches the others only through a bridge.

In: the names of the machines, and an empty folder for their logs. Out: `Machine`s that run commands
and can be killed or unplugged. They share nothing but this checkout and its .venv, both read-only,
and, with `shared`, a folder at TESSERA_HOME. The network of the host is not touched. All processes
of a machine end with it, and every machine ends with the process that made it, even if that process
is killed. Needs root. Must not know Ray, MLflow or Tessera.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

CHECKOUT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
HOME = "/srv/tessera"
"""TESSERA_HOME on every machine."""

_TOOLS = ("unshare", "nsenter", "setpriv", "ip", "mount")
_NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_LIFETIME_SECONDS = 7200
_TRIAL = (
    "ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    " && mount -t tmpfs tmpfs /mnt"
)

_BOOT = """
set -e
hostname {name}
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir /mnt/shared
if [ -n "{shared}" ]; then mount --bind "{shared}" /mnt/shared; fi
i=0
for folder in {readable}; do
  i=$((i+1)); mkdir /mnt/$i; mount --bind "$folder" /mnt/$i; mount -o remount,bind,ro /mnt/$i
done
mount -t tmpfs -o size={disk_bytes} tmpfs /tmp
i=0
for folder in {readable}; do
  i=$((i+1)); mkdir -p "$folder"; mount --move /mnt/$i "$folder"
done
mount -t tmpfs -o size={shared_memory_bytes} tmpfs /dev/shm
mount -t tmpfs -o size={disk_bytes} tmpfs /srv
printf '{hosts}' > /mnt/hosts
mount --bind /mnt/hosts /etc/hosts
mkdir /srv/tessera /srv/home
if [ -n "{shared}" ]; then mount --move /mnt/shared /srv/tessera; fi
ip link set lo up
touch /srv/ready
exec sleep {lifetime_seconds}
"""


@functools.cache
def missing() -> str:
    """Why there can be no machines here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "machines of namespaces need Linux and root"
    if lacking := [tool for tool in _TOOLS if not shutil.which(tool)]:
        return f"{lacking[0]} is not installed (make lab)"
    trial = ["unshare", *_NAMESPACES, "sh", "-c", _TRIAL]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines() or ["?"]
    return f"no namespaces here: {lines[-1]}" if done.returncode else ""


class Machine:
    """A running machine, reached by the others under `name` or `address`."""

    def __init__(self, lab: Lab, name: str, boot: str) -> None:
        self.name, self.address = name, lab.addresses[name]
        self._lab, self._link = lab, f"v{self.address.rpartition('.')[2]}"
        command = [*_DIES_WITH_US, "unshare", *_NAMESPACES, "--kill-child", "bash", "-c", boot]
        self._log = lab.logs / f"{name}.boot.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.pid = self._wait_for_boot()
        peer = ("peer", "name", "eth0", "netns", str(self.pid))
        lab.on_bridge("ip", "link", "add", self._link, "type", "veth", *peer)
        lab.on_bridge("ip", "link", "set", self._link, "master", "br0", "up")
        inside = ("nsenter", "-t", str(self.pid), "-n", "ip")
        _call(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _call(*inside, "link", "set", "eth0", "up")

    def _wait_for_boot(self) -> int:
        """The process that the machine's others descend from, by its id on the host."""
        deadline = time.monotonic() + 30
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while time.monotonic() < deadline and self._process.poll() is None:
            pids = children.read_text().split()
            if pids and Path("/proc", pids[0], "root", "srv", "ready").exists():
                return int(pids[0])
            time.sleep(0.02)
        self._process.kill()
        raise RuntimeError(f"{self.name} did not start: {self._log.read_text(errors='replace')}")

    def run(
        self,
        command: str,
        environment: Mapping[str, str] | None = None,
        *,
        timeout_seconds: float = 300,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a shell command in /srv. One that takes too long is ended with status 124. With
        `check`, raises RuntimeError if it fails."""
        limited = f"timeout -k 10 {timeout_seconds:g} bash -c {shlex.quote(command)}"
        done = subprocess.run(
            self._arguments(limited),
            env=self._environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds + 30,
            check=False,
        )
        if check and done.returncode:
            output = (done.stdout + done.stderr)[-3000:]
            raise RuntimeError(f"{self.name}: {command}: status {done.returncode}\n{output}")
        return done

    def start(
        self, command: str, environment: Mapping[str, str] | None = None, *, log: str = ""
    ) -> subprocess.Popen[bytes]:
        """Starts a shell command in the background. Its output is appended to the file `log`
        (default: NAME.log) in the lab's folder of logs."""
        with (self._lab.logs / (log or f"{self.name}.log")).open("ab") as out:
            return subprocess.Popen(
                [*_DIES_WITH_US, *self._arguments("exec " + command)],
                env=self._environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _arguments(self, command: str) -> list[str]:
        enter = ["nsenter", "-t", str(self.pid), "-m", "-n", "-u", "-i", "-p"]
        return [*enter, "bash", "-c", f"cd /srv && {command}"]

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        return {
            "PATH": f"{CHECKOUT}/.venv/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/srv/home",
            "LANG": "C.UTF-8",
            "TESSERA_HOME": HOME,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # the checkout is read-only
            **self._lab.environment,
            **(more or {}),
        }

    def path(self, inside: str) -> Path:
        """A path of the machine, as this process sees it. Absolute links lead elsewhere."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def processes(self) -> list[str]:
        """The command lines of all processes on the machine."""
        return self.run("ps ax -o args", check=True).stdout.splitlines()

    def unplug(self) -> None:
        """Takes the machine off the network; its processes notice nothing else."""
        self._lab.on_bridge("ip", "link", "set", self._link, "down")

    def plug(self) -> None:
        self._lab.on_bridge("ip", "link", "set", self._link, "up")

    def block(self, other: Machine) -> None:
        """Loses every packet to one other machine without a word, and so ends all connections with
        it: they are sent to a card that no machine has."""
        self._neighbour("replace", other, "lladdr", "02:00:00:00:00:01", "nud", "permanent")

    def unblock(self, other: Machine) -> None:
        self._neighbour("del", other)

    def _neighbour(self, action: str, other: Machine, *more: str) -> None:
        enter = ("nsenter", "-t", str(self.pid), "-n")
        _call(*enter, "ip", "neigh", action, other.address, "dev", "eth0", *more)

    def kill(self) -> None:
        """Ends the machine at once, with all its processes, and its disk is lost. Does nothing if
        it was killed before."""
        if self._lab.machines.get(self.name) is not self:
            return
        self._process.kill()  # the kernel then kills process 1 of the machine, and with it the rest
        self._process.wait(timeout=20)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{self.pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        # The kernel deletes the link later, when the last process has left the namespace.
        self._lab.on_bridge("ip", "link", "del", self._link, check=False)
        self._lab.machines.pop(self.name, None)


class Lab:
    """A bridge with machines on it, as a context.

    Args:
        folder: An empty folder; `logs` in it has the output of what machines start.
        names: All machines that there will be. Each can be looked up on every machine.
        shared: Whether TESSERA_HOME is one folder that all machines share.

    `environment` is set for each command on each machine, besides the lab's own variables.
    """

    def __init__(self, folder: Path, names: Sequence[str], *, shared: bool = False) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self.environment: dict[str, str] = {}
        self.machines: dict[str, Machine] = {}
        self.addresses = {name: f"{NETWORK}.{i}" for i, name in enumerate(names, 2)}
        self._shared = folder / "shared" if shared else None
        if self._shared:
            self._shared.mkdir()

    def __enter__(self) -> Lab:
        sleep = ("unshare", "--net", "sleep", str(_LIFETIME_SECONDS))
        self._bridge = subprocess.Popen([*_DIES_WITH_US, *sleep], start_new_session=True)
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self._bridge.pid}/ns/net") == own:
            time.sleep(0.01)
        self.on_bridge("ip", "link", "set", "lo", "up")
        self.on_bridge("ip", "link", "add", "br0", "type", "bridge")
        self.on_bridge("ip", "addr", "add", f"{NETWORK}.1/24", "dev", "br0")
        self.on_bridge("ip", "link", "set", "br0", "up")
        self._client = ThreadPoolExecutor(1, initializer=_enter_network, initargs=(self._bridge,))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for machine in list(self.machines.values()):
            machine.kill()
        self._client.shutdown()
        self._bridge.kill()
        self._bridge.wait()

    def machine(
        self, name: str, *, disk_bytes: int = 2**31, shared_memory_bytes: int = 2**31
    ) -> Machine:
        """Starts the machine of that name, with an empty disk."""
        roots = {CHECKOUT, (CHECKOUT / ".venv").resolve().parent, Path(sys.base_prefix).resolve()}
        hidden = [root for root in roots if root.is_relative_to("/tmp") or root == CHECKOUT]
        hosts = [f"{address} {name}" for name, address in self.addresses.items()]
        boot = _BOOT.format(
            name=name,
            shared=self._shared or "",
            readable=" ".join(shlex.quote(str(root)) for root in hidden),
            disk_bytes=disk_bytes,
            shared_memory_bytes=shared_memory_bytes,
            hosts="\\n".join(["127.0.0.1 localhost", *hosts, ""]),
            lifetime_seconds=_LIFETIME_SECONDS,
        )
        self.machines[name] = machine = Machine(self, name, boot)
        return machine

    def on_bridge(self, *command: str, check: bool = True) -> None:
        """Runs a command in the bridge's network namespace."""
        _call("nsenter", "-t", str(self._bridge.pid), "-n", *command, check=check)

    def get(self, url: str, *, token: str = "") -> str | None:
        """The body that a machine serves at `url`; None if it doesn't, or not in 5 seconds."""
        return self._client.submit(_get, url, token).result()

    def log(self, name: str) -> str:
        path = self.logs / name
        return path.read_text(errors="replace") if path.exists() else ""


def _get(url: str, token: str) -> str | None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=5) as response:
            return str(response.read().decode())
    except OSError:
        return None


def _enter_network(process: subprocess.Popen[bytes]) -> None:
    """Puts this thread, and no other, into the network namespace of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{process.pid}/ns/net") as namespace:
        if libc.setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")


def _call(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")
