"""An interrupted pack resumes, and writes the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import fresh_process
import pytest
from sample_sources import noise, save

from models.core.errors import TesseraError, UsageError
from pipelines.data import card as cards
from pipelines.data.packing import staging, statistics
from pipelines.data.packing.pack import pack
from pipelines.data.packing.run import map_here
from pipelines.data.packing.shard import PackSpec, ShardPlan
from pipelines.storage.open import open_storage

MakeFolder = Callable[..., Path]
MakeImage = Callable[..., Path]
ROOT = Path(__file__).parents[4]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Log:
    """Packs in this process, and records the packed shards and the messages."""

    def __init__(self) -> None:
        self.packed: list[str] = []
        self.said: list[str] = []

    def map_tasks(
        self, work: Any, spec: PackSpec, shards: Iterable[ShardPlan]
    ) -> Generator[tuple[int, Any], None, None]:
        shards = list(shards)
        if work.__name__ == "pack_shard":
            self.packed += [shard_plan.path for shard_plan in shards]
        yield from map_here(work, spec, shards)

    @property
    def resumed(self) -> str:
        return next((line for line in self.said if line.startswith("resuming")), "")


def run(source: Path, to: Path | str, **options: Any) -> Log:
    log = Log()
    pack(str(source), to, map_tasks=log.map_tasks, notify=log.said.append, **options)
    return log


class Stop:
    """Ends a pack, as Ctrl-C would, after a number of images."""

    def __init__(self, images: int) -> None:
        self._images = images

    def __call__(self, done: int, total: int) -> None:
        if done >= self._images:
            raise KeyboardInterrupt


def interrupt(source: Path, to: Path | str, images: int = 0, **options: Any) -> Log:
    log = Log()
    with pytest.raises(KeyboardInterrupt):
        pack(
            str(source),
            to,
            map_tasks=log.map_tasks,
            notify=log.said.append,
            progress=Stop(images),
            **options,
        )
    return log


@pytest.fixture
def pets(tmp_path: Path, make_folder: MakeFolder) -> Path:
    """60 images; with 10 per shard they make 5, 1 and 1 shards."""
    return make_folder(tmp_path / "pets", ["cat", "dog"], 30)


def test_ctrl_c_keeps_finished_shards_and_the_next_call_resumes(tmp_path: Path, pets: Path) -> None:
    fresh = run(pets, tmp_path / "fresh", shard_samples=10)
    assert len(fresh.packed) == 7
    stopped = interrupt(pets, tmp_path / "out", 28, shard_samples=10)
    assert stopped.said[-1] == (
        "stopped: 3 of 7 shards are kept, the same command resumes with them"
    )
    assert not (tmp_path / "out").exists()
    again = run(pets, tmp_path / "out", shard_samples=10)
    assert again.resumed == "resuming: 3 of 7 shards are packed already"
    assert again.packed == fresh.packed[3:]
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "out", "pets"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source `pets`, its pack `fresh`, and `out`, whose pack was interrupted.
    Only read."""
    folder = tmp_path_factory.mktemp("interrupted")
    for number in range(60):
        name = f"{('cat', 'dog')[number % 2]}/{number:03d}.png"
        save(folder / "pets" / name, noise(number, 6, 8))
    run(folder / "pets", folder / "fresh", shard_samples=10)
    interrupt(folder / "pets", folder / "out", 50, shard_samples=10)
    return folder


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"shard_samples": 9}, {"resize": 4}, {"unseen": ["cat"]}]
)
def test_a_changed_plan_starts_over(
    tmp_path: Path, interrupted: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(interrupted / ".out.packing", tmp_path / ".out.packing")
    other = {"shard_samples": 10, **change}
    again = run(interrupted / "pets", tmp_path / "out", **other)
    assert again.resumed == ""
    run(interrupted / "pets", tmp_path / "fresh", **other)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_changed_list_of_images_starts_over(
    tmp_path: Path, pets: Path, make_image: MakeImage
) -> None:
    interrupt(pets, tmp_path / "out", 50, shard_samples=10)
    make_image(pets / "cat" / "new.jpg", seed=77)
    assert run(pets, tmp_path / "out", shard_samples=10).resumed == ""
    run(pets, tmp_path / "fresh", shard_samples=10)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_file_that_changed_has_its_shard_packed_again(
    tmp_path: Path, pets: Path, make_image: MakeImage
) -> None:
    interrupt(pets, tmp_path / "out", 50, shard_samples=10)
    make_image(pets / "cat" / "003.jpg", seed=78, size=(9, 9))
    again = run(pets, tmp_path / "out", shard_samples=10)
    assert again.resumed == "resuming: 5 of 7 shards are packed already"
    assert len(again.packed) == 2
    run(pets, tmp_path / "fresh", shard_samples=10)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


NOTES = f"{staging.SHARDS}/train/000001"


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "name", ["train/000001.tar", f"{NOTES}.json", f"{NOTES}.rows.npy", f"{NOTES}.fingerprints.npy"]
)
def test_a_damaged_shard_or_record_is_packed_again(
    tmp_path: Path, interrupted: Path, name: str, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(interrupted / ".out.packing", tmp_path / ".out.packing")
    damage(tmp_path / ".out.packing" / name)
    again = run(interrupted / "pets", tmp_path / "out", shard_samples=10)
    assert "train/000001.tar" in again.packed or name.endswith(".json")
    assert len(again.packed) < 7, "the other shards are kept"
    assert contents(tmp_path / "out") == contents(interrupted / "fresh")


def test_without_the_check_a_damaged_shard_would_be_kept(
    tmp_path: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of the test above."""
    shutil.copytree(interrupted / ".out.packing", tmp_path / ".out.packing")
    flip(tmp_path / ".out.packing" / "train" / "000001.tar")
    monkeypatch.setattr("pipelines.data.packing.shard._is_stored", lambda *_: True)
    run(interrupted / "pets", tmp_path / "out", shard_samples=10)
    assert contents(tmp_path / "out") != contents(interrupted / "fresh")


def test_too_many_rejected_samples_keep_the_finished_shards(tmp_path: Path, pets: Path) -> None:
    (pets / "cat" / "bad.jpg").write_bytes(b"x")
    with pytest.raises(statistics.ResumableError, match=r"\.out\.packing/rejected\.jsonl"):
        run(pets, tmp_path / "out", shard_samples=10)
    row = json.loads((tmp_path / ".out.packing" / statistics.REJECTED).read_text())
    assert (row["key"], row["reason"]) == ("cat/bad", "unreadable image")
    again = run(pets, tmp_path / "out", shard_samples=10, allow_rejected="1")
    assert again.packed == []
    run(pets, tmp_path / "fresh", shard_samples=10, allow_rejected="1")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_repaired_sample_is_packed(tmp_path: Path, pets: Path) -> None:
    """Also if the size and time of its file are unchanged, as after a temporary read error."""
    file = pets / "cat" / "003.jpg"
    good, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(b"x" * len(good))
    os.utime(file, ns=times)
    with pytest.raises(statistics.ResumableError):
        run(pets, tmp_path / "out", shard_samples=10)
    file.write_bytes(good)
    os.utime(file, ns=times)
    again = run(pets, tmp_path / "out", shard_samples=10)
    assert len(again.packed) == 1
    run(pets, tmp_path / "fresh", shard_samples=10)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_an_invalid_call_keeps_the_finished_shards(tmp_path: Path, pets: Path) -> None:
    interrupt(pets, tmp_path / "out", 50, shard_samples=10)
    with pytest.raises(UsageError):
        run(pets, tmp_path / "out", format="minst")
    with pytest.raises(TesseraError):
        run(pets / "cat", tmp_path / "out", format="mnist")
    assert run(pets, tmp_path / "out", shard_samples=10).resumed.startswith("resuming: 6 of 7")


STRIDE = 4
"""1 kills at every step, which takes minutes; it was run so too."""
KILLED_AT = """
import os, random, signal, sys, time
from pathlib import Path
from models.core.errors import TesseraError
from pipelines.data.packing.pack import pack
import webdataset, torch

source, to, stride = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
begin = {"open", "os.rename", "os.remove", "os.mkdir"}
kill_at = [0]
def count(event, args):
    if event in begin and (event != "open" or args[2] & os.O_ACCMODE):
        kill_at[0] -= 1
        if kill_at[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)

def attempt(to, number, seconds=None):
    child = os.fork()
    if not child:
        kill_at[0] = number
        try:
            pack(source, to, shard_samples=8)
        except TesseraError as error:  # killed after its last step
            assert "is already a packed data set" in error.message
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0

number, kills = 0, 0
while True:  # killed at an early step, then at a later one, ... and gone on each time
    number += stride
    if attempt(to / f"{number:04d}", number):
        break
    kills += 1
    assert attempt(to / f"{number:04d}", 0)
print(kills)
draws = random.Random(0)
for kills in range(100):  # killed again and again, until it gets through
    if attempt(to / "random", 0, draws.uniform(0, 0.03 * kills)):
        break
else:
    assert attempt(to / "random", 0)
print(kills)
"""


@pytest.mark.slow
def test_a_pack_killed_at_any_step_resumes_to_the_same_bytes(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    """SIGKILL before each call that changes a folder, one after the other, and at random times."""
    source = make_folder(tmp_path / "pets", ["cat"], 24)
    pack(str(source), tmp_path / "fresh", shard_samples=8)
    fresh = contents(tmp_path / "fresh")
    (tmp_path / "out").mkdir()
    done = fresh_process.run(KILLED_AT, str(source), str(tmp_path / "out"), str(STRIDE))
    assert done.returncode == 0, done.stderr
    each, at_random = map(int, done.stdout.split())
    assert each * STRIDE > 80
    assert at_random > 0
    finished = [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert len(finished) == each + 2
    for path in finished:
        assert contents(path) == fresh, path
    leftover = [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert leftover == []


def test_an_incomplete_pack_is_never_a_data_set(tmp_path: Path, pets: Path) -> None:
    interrupt(pets, tmp_path / "out", 50, shard_samples=10)
    shutil.copytree(tmp_path / ".out.packing", tmp_path / "stolen")
    with pytest.raises(TesseraError, match="is not a packed data set"):
        cards.read(tmp_path / "stolen")


def test_a_pack_to_an_address_resumes(tmp_path: Path, pets: Path) -> None:
    url = f"memory://{tmp_path.name}/out"
    storage = open_storage(url)
    run(pets, tmp_path / "fresh", shard_samples=10)
    interrupt(pets, url, 50, shard_samples=10)
    assert storage.size("card.json") is None
    again = run(pets, url, shard_samples=10)
    assert again.resumed == "resuming: 6 of 7 shards are packed already"
    assert {name: storage.read(name) for name in storage.names()} == contents(tmp_path / "fresh")


def test_a_refused_pack_to_an_address_writes_nothing(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 2)
    for name in ("000", "001"):
        (source / "dog" / f"{name}.jpg").write_bytes(b"x")
    url = f"memory://{tmp_path.name}/out"
    with pytest.raises(TesseraError, match="no train image of the class 'dog' left"):
        run(source, url, allow_rejected="2")
    assert open_storage(url).names() == []


def test_an_address_with_other_files_is_refused(tmp_path: Path, pets: Path) -> None:
    url = f"memory://{tmp_path.name}/out"
    open_storage(url).write("mine.txt", b"keep")
    with pytest.raises(TesseraError, match="is not empty"):
        run(pets, url)
    assert open_storage(url).names() == ["mine.txt"]
