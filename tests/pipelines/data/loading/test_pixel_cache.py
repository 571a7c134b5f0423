"""Decoded images are shared by processes, decoded once, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec
from pipelines.data.card import Card
from pipelines.data.loading import pixel_cache
from pipelines.data.loading.batches import BatchMaker
from pipelines.data.loading.loaders import TrainLoader
from pipelines.interfaces import World

MakeSet = Callable[..., tuple[Path, Card]]
SPEC = DataSpec(task="classification", channels=3, height=4, width=5)
MASKS = DataSpec(task="semantic_segmentation", channels=1, height=4, width=5)


@pytest.mark.parametrize("spec", [SPEC, MASKS])
def test_what_one_writes_the_other_reads(spec: DataSpec) -> None:
    made = pixel_cache.create(7, spec)
    assert made is not None
    assert made.path is not None
    other = pixel_cache.open_file(made.path, 7, spec)
    for name, tensor in made.tensors().items():
        assert not tensor.any(), name
        tensor[-1:] = 9
        assert torch.equal(other.tensors()[name], tensor), name
    assert len(made.masks) == (7 if spec is MASKS else 0)
    made.unlink()
    made.unlink()
    assert not made.path.exists()
    assert other.images[6].unique().tolist() == [9]


def test_a_file_of_another_size_is_refused() -> None:
    made = pixel_cache.create(7, SPEC)
    assert made is not None
    assert made.path is not None
    with pytest.raises(TesseraError, match="another data set or size"):
        pixel_cache.open_file(made.path, 7000, SPEC)
    made.unlink()
    with pytest.raises(TesseraError, match="can't be opened"):
        pixel_cache.open_file(made.path, 7, SPEC)


def test_without_room_in_shared_memory_it_lies_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_cache, "SHARED_FOLDER", tmp_path / "absent")
    made = pixel_cache.create(7, SPEC)
    assert made is not None
    assert made.path is not None
    assert made.path.parent != pixel_cache.SHARED_FOLDER
    made.unlink()


def test_where_nothing_has_room_there_is_none() -> None:
    before = sorted(Path("/dev/shm").glob("tessera-*"))
    assert pixel_cache.create(1 << 45, SPEC) is None
    assert sorted(Path("/dev/shm").glob("tessera-*")) == before


KILLED = """
import os, signal
from models.core.family import DataSpec
from pipelines.data.loading import pixel_cache
spec = DataSpec(task="images", channels=1, height=4, width=4)
made = pixel_cache.create(100, spec)
print(made.path, flush=True)
if UNLINK:
    made.unlink()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("unlink", [True, False])
def test_a_killed_process_leaves_no_file_once_all_have_it_open(unlink: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED.replace("UNLINK", str(unlink))],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL
    path = Path(done.stdout.strip())
    assert path.exists() is not unlink  # else, the control, it stays
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"cache": "auto", "cache_bytes": 1000 * 60}, "memory"),
        ({"cache": "auto", "cache_bytes": 1000 * 60 - 1}, "none"),
        ({"cache": "memory", "cache_bytes": 1000 * 60}, "memory"),
        ({"cache": "none", "cache_bytes": 1 << 40}, "none"),
        ({"cache": "device", "cache_bytes": 1 << 40}, "memory"),
    ],
)
def test_the_budget_decides(arguments: dict[str, object], kind: str) -> None:
    choice = pixel_cache.choose(1000, SPEC, **arguments)  # type: ignore[arg-type]
    assert choice.kind == kind
    assert str(choice).startswith(f"{kind}: ")


def test_what_is_asked_for_and_does_not_fit_is_an_error() -> None:
    for cache in ("memory", "device"):
        with pytest.raises(TesseraError, match=r"60\.0 kB of decoded images don't fit .* 1\.0 kB"):
            pixel_cache.choose(1000, SPEC, cache=cache, cache_bytes=1000)
    with pytest.raises(UsageError, match="unknown cache 'disk'"):
        pixel_cache.choose(1000, SPEC, cache="disk", cache_bytes=1000)


def test_masks_count_too() -> None:
    assert pixel_cache.size_bytes(10, MASKS) == 10 * 2 * 20
    assert pixel_cache.size_bytes(10, SPEC) == 10 * 3 * 20


def load(folder: Path, card: Card, world: World, **options: object) -> TrainLoader:
    return TrainLoader(
        folder,
        card,
        card.spec(),
        batch_size=6,
        seed=0,
        world=world,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_that_share_decode_each_sample_once(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch, workers: int, tmp_path: Path
) -> None:
    """A line for each image that any process decodes; without sharing, the control, each rank
    decodes again what the next epoch's cut gives it."""
    folder, card = make_set(29)
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    real = BatchMaker._decode

    def logged(self: BatchMaker, piece: object, missing: object, *more: object) -> None:
        os.write(log, b"x" * int(missing.sum()))  # type: ignore[attr-defined]
        real(self, piece, missing, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(BatchMaker, "_decode", logged)
    counts = []
    for shared in (True, False):
        made = pixel_cache.create(29, card.spec())
        assert made is not None
        assert made.path is not None
        paths = [made, pixel_cache.open_file(made.path, 29, card.spec())]
        made.unlink()
        loaders = [
            load(
                folder,
                card,
                World(r, 2),
                share=paths[r] if shared else None,
                loader_workers=workers,
            )
            for r in range(2)
        ]
        before = os.fstat(log).st_size
        for epoch in range(3):
            seen = []
            for loader in loaders:
                for step in loader.epoch(epoch):
                    assert torch.equal(step.batch["image"][:, 0, 2, 3].long(), step.batch["index"])
                    seen += step.batch["index"].tolist()[: step.counted]
            assert sorted(seen) == list(range(29))
        counts.append(os.fstat(log).st_size - before)
        for loader in loaders:
            loader.close()
    os.close(log)
    assert counts[0] == 29
    assert counts[1] > 29


def test_the_loader_says_what_it_chose(make_set: MakeSet) -> None:
    folder, card = make_set(20)
    kept = load(folder, card, World())
    assert kept.cache_choice == "memory: 320 bytes of images fit the budget of 2.1 GB"
    read = load(folder, card, World(), cache_bytes=100)
    assert read.cache_choice == "none: 320 bytes of images don't fit the budget of 100 bytes"


def test_a_batch_from_memory_is_the_caller_s_own(make_set: MakeSet) -> None:
    """What a training does to its batch stays out of the memory."""
    folder, card = make_set(12)
    for workers in (0, 1):
        loader = load(folder, card, World(), loader_workers=workers)
        for _ in range(3):
            for step in loader.epoch(0):
                assert torch.equal(step.batch["image"][:, 0, 0, 0].long(), step.batch["index"])
                step.batch["image"].fill_(255)
                step.batch["size"].fill_(0)
        loader.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_out_of_the_ring_is_the_caller_s_own(make_set: MakeSet, workers: int) -> None:
    """The ring is written again while the first batch is still in use."""
    folder, card = make_set(120)
    loader = load(folder, card, World(), cache="none", loader_workers=workers)
    steps = list(loader.epoch(0))
    for step in steps:
        assert torch.equal(step.batch["image"][:, 0, 0, 0].long(), step.batch["index"])
    loader.close()
