"""Tasks on a real Ray: each part is done once, whichever worker dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from models.core.errors import TesseraError, UsageError
from pipelines.cluster import tasks
from pipelines.data.packing.pack import pack

if TYPE_CHECKING:  # a worker, which imports this file, doesn't find it
    from cli_runner import Call

pytestmark = pytest.mark.slow


def double(shared: int, part: int) -> tuple[int, str | None]:
    return shared * part, os.environ.get("OMP_NUM_THREADS")


def refuse(shared: str, part: int) -> int:
    if part == 3:
        raise UsageError(f"{shared} can't be", hint="give another")
    return part


def fill_the_disk(shared: None, part: int) -> None:
    raise OSError(28, "No space left on device")


def stumble(shared: None, part: int) -> None:
    raise ValueError("two\nlines")


def die(shared: Path, part: int) -> int:
    """Part 2 is killed by SIGKILL once, part 4 every time."""
    first = not (shared / str(part)).exists()
    (shared / str(part)).touch()
    if part == 4 or (part == 2 and first):
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def count_open(shared: Path, part: int) -> int:
    mine = shared / f"{part}"
    mine.touch()
    time.sleep(0.1)
    result = len(list(shared.iterdir()))
    mine.unlink()
    return result


def test_each_result_is_returned_once_with_its_number(ray_cluster: None) -> None:
    result = dict(tasks.map_tasks(double, 10, iter(range(20)), workers=3))
    assert result == {number: (10 * number, "1") for number in range(20)}


def test_no_more_tasks_run_at_once_than_requested(ray_cluster: None, tmp_path: Path) -> None:
    result = dict(tasks.map_tasks(count_open, tmp_path, range(12), workers=2))
    assert max(result.values()) == 2


def test_a_tessera_error_of_a_task_is_raised_unchanged(ray_cluster: None) -> None:
    with pytest.raises(UsageError) as caught:
        list(tasks.map_tasks(refuse, "this", range(9), workers=2))
    assert (caught.value.message, caught.value.hint) == ("this can't be", "give another")
    with pytest.raises(OSError, match="No space left"):
        list(tasks.map_tasks(fill_the_disk, None, [1], workers=2))
    with pytest.raises(TesseraError, match=r"part 0 failed: ValueError: lines"):
        list(tasks.map_tasks(stumble, None, [1], workers=2))


def test_a_killed_worker_is_replaced_a_limited_number_of_times(
    ray_cluster: None, tmp_path: Path
) -> None:
    assert dict(tasks.map_tasks(die, tmp_path, range(4), workers=2)) == {n: n for n in range(4)}
    with pytest.raises(TesseraError, match=r"the worker of part 4 died 4 times"):
        list(tasks.map_tasks(die, tmp_path, range(6), workers=2))


class Killer(threading.Thread):
    """Kills some of the packing workers of this process's cluster."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.killed, self._most, self._ended = 0, most, threading.Event()

    def run(self) -> None:
        while self.killed < self._most and not self._ended.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "ray::pack_shard" in process.cmdline()[:1]:
                        process.kill()
                        self.killed += 1
                        break
                except psutil.Error:
                    continue

    def end(self) -> None:
        self._ended.set()
        self.join()


@pytest.mark.cluster
def test_a_pack_on_the_cluster_equals_a_local_one_when_workers_are_killed(
    ray_cluster: None, tmp_path: Path, make_pets: Callable[[int], Path]
) -> None:
    source = make_pets(1500)
    here = pack(str(source), tmp_path / "here", shard_samples=200)

    def map_tasks(*arguments: Any) -> Any:
        return tasks.map_tasks(*arguments, workers=2)

    killer = Killer(3)
    killer.start()
    seen: list[tuple[int, int]] = []
    try:
        there = pack(
            str(source),
            tmp_path / "there",
            shard_samples=200,
            map_tasks=map_tasks,
            progress=lambda *at: seen.append(at),
        )
    finally:
        killer.end()
    assert killer.killed > 0
    assert there == here
    for path in (tmp_path / "here").rglob("*"):
        if path.is_file():
            other = tmp_path / "there" / path.relative_to(tmp_path / "here")
            assert other.read_bytes() == path.read_bytes()
    assert seen == sorted(seen)
    assert seen[-1] == (1500, 1500)
    assert len(seen) == sum(len(split.shards) for split in here.splits.values())


def test_a_pack_stopped_on_the_cluster_resumes_locally(
    ray_cluster: None, tmp_path: Path, make_pets: Callable[[int], Path]
) -> None:
    source = make_pets(400)
    here = pack(str(source), tmp_path / "here", shard_samples=40)

    def map_tasks(*arguments: Any) -> Any:
        return tasks.map_tasks(*arguments, workers=2)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(source), tmp_path / "there", shard_samples=40, map_tasks=map_tasks, progress=stop)
    messages: list[str] = []
    assert pack(str(source), tmp_path / "there", shard_samples=40, notify=messages.append) == here
    assert any(line.startswith("resuming: ") for line in messages)


def test_the_pack_command_on_the_cluster_equals_a_local_one(
    ray_cluster: None, tmp_path: Path, make_pets: Callable[[int], Path], call: Call
) -> None:
    pets = make_pets(20)
    here = call("pack", pets, "--to", tmp_path / "here", "--json")
    there = call("pack", pets, "--to", tmp_path / "there", "--workers", 2, "--json")
    assert there.status == 0, there.err
    assert there.out == here.out


@pytest.fixture
def make_pets(tmp_path: Path) -> Callable[[int], Path]:
    import numpy as np
    from PIL import Image

    def make(count: int) -> Path:
        (tmp_path / "pets" / "cat").mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        for number in range(count):
            Image.fromarray(pixels[number]).save(tmp_path / "pets" / "cat" / f"{number}.png")
        return tmp_path / "pets"

    return make
