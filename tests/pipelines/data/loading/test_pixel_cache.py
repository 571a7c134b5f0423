"""Memory for decoded images is shared by processes, and leaves no file behind."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import fresh_process
import pytest
import torch

from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec
from pipelines.data.card import Card
from pipelines.data.loading import pixel_cache

MakeSet = Callable[..., tuple[Path, Card]]
SPEC = DataSpec(task="classification", channels=3, height=4, width=5)
MASKS = DataSpec(task="semantic_segmentation", channels=1, height=4, width=5)


@pytest.mark.parametrize("spec", [SPEC, MASKS])
def test_processes_share_the_memory(spec: DataSpec) -> None:
    buffer = pixel_cache.create(7, spec)
    assert buffer is not None
    assert buffer.path is not None
    other = pixel_cache.open_file(buffer.path, 7, spec)
    for name, tensor in buffer.tensors().items():
        assert not tensor.any(), name
        tensor[-1:] = 9
        assert torch.equal(other.tensors()[name], tensor), name
    assert len(buffer.masks) == (7 if spec is MASKS else 0)
    buffer.unlink()
    buffer.unlink()
    assert not buffer.path.exists()
    assert other.images[6].unique().tolist() == [9]


def test_a_file_of_another_size_is_refused() -> None:
    buffer = pixel_cache.create(7, SPEC)
    assert buffer is not None
    assert buffer.path is not None
    with pytest.raises(TesseraError, match="another data set or size"):
        pixel_cache.open_file(buffer.path, 7000, SPEC)
    buffer.unlink()
    with pytest.raises(TesseraError, match="can't be opened"):
        pixel_cache.open_file(buffer.path, 7, SPEC)


def test_the_temporary_folder_is_used_without_enough_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_cache, "SHARED_FOLDER", tmp_path / "absent")
    buffer = pixel_cache.create(7, SPEC)
    assert buffer is not None
    assert buffer.path is not None
    assert buffer.path.parent != pixel_cache.SHARED_FOLDER
    buffer.unlink()


def test_without_enough_space_there_is_no_buffer() -> None:
    before = sorted(Path("/dev/shm").glob("tessera-*"))
    assert pixel_cache.create(1 << 45, SPEC) is None
    assert sorted(Path("/dev/shm").glob("tessera-*")) == before


KILLED = """
import os, signal
from models.core.family import DataSpec
from pipelines.data.loading import pixel_cache
spec = DataSpec(task="images", channels=1, height=4, width=4)
buffer = pixel_cache.create(100, spec)
print(buffer.path, flush=True)
if UNLINK:
    buffer.unlink()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("unlink", [True, False])
def test_a_killed_process_leaves_no_file_after_all_have_opened_it(unlink: bool) -> None:
    done = fresh_process.run(KILLED.replace("UNLINK", str(unlink)))
    assert done.returncode == -signal.SIGKILL
    path = Path(done.stdout.decode().strip())
    assert path.exists() is not unlink  # the control: without unlink the file stays
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
def test_the_budget_decides_where_images_are_cached(
    arguments: dict[str, object], kind: str
) -> None:
    choice = pixel_cache.choose(1000, SPEC, **arguments)  # type: ignore[arg-type]
    assert choice.kind == kind
    assert str(choice).startswith(f"{kind}: ")


def test_a_requested_cache_that_is_too_small_is_an_error() -> None:
    for cache in ("memory", "device"):
        with pytest.raises(TesseraError, match=r"60\.0 kB of decoded images don't fit .* 1\.0 kB"):
            pixel_cache.choose(1000, SPEC, cache=cache, cache_bytes=1000)
    with pytest.raises(UsageError, match="unknown cache 'disk'"):
        pixel_cache.choose(1000, SPEC, cache="disk", cache_bytes=1000)


def test_masks_are_included_in_the_size() -> None:
    assert pixel_cache.size_bytes(10, MASKS) == 10 * 2 * 20
    assert pixel_cache.size_bytes(10, SPEC) == 10 * 3 * 20
