"""Decoded images of a split, in memory that all processes of a node share.

In: the number of samples and the data spec. Out: a `PixelBuffer` for every process that opens it.
Must not know shards, nor how processes agree: one process calls `create` and sends the path to the
others, they call `open_file`, and when all have opened it the first calls `unlink`. From then on
the memory is freed with the last process, however that ends.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.core.errors import TesseraError, unknown
from models.core.family import DataSpec

Cache = Literal["auto", "none", "memory", "device"]
CACHES = ("auto", "none", "memory", "device")
SHARED_FOLDER = Path("/dev/shm")
_ALIGN = 4096
_FREE_SHARE = 4


class PixelBuffer:
    """Memory for N decoded samples.

    images  uint8 (N, C, H, W)
    masks   uint8 (N, H, W) for semantic segmentation, else (0, H, W)
    sizes   int64 (N, 2): height and width before the image was fitted
    filled  uint8 (N,): 1 if the sample is decoded, written last. Two processes that decode the same
            sample write the same bytes, so there is no lock
    """

    def __init__(self, samples: int, spec: DataSpec, memory: Any = None) -> None:
        self._memory = memory
        masks = samples if spec.task == "semantic_segmentation" else 0
        offset = 0

        def allocate(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
            nonlocal offset
            if memory is None or not math.prod(shape):
                return torch.empty(shape, dtype=kind)
            tensor = torch.frombuffer(memory, dtype=kind, count=math.prod(shape), offset=offset)
            offset += _aligned(tensor.nbytes)
            return tensor.view(shape)

        self.images = allocate((samples, *spec.shape), torch.uint8)
        self.masks = allocate((masks, spec.height, spec.width), torch.uint8)
        self.sizes = allocate((samples, 2), torch.int64)
        self.filled = allocate((samples,), torch.uint8)
        if memory is None:
            self.filled.zero_()

    def part(self, start: int, stop: int) -> PixelBuffer:
        """The samples `start` to `stop`, in the same memory."""
        view = object.__new__(PixelBuffer)
        view.__dict__ = {name: value[start:stop] for name, value in self.tensors().items()}
        return view

    def tensors(self) -> dict[str, Tensor]:
        return {n: v for n, v in self.__dict__.items() if isinstance(v, Tensor)}

    @property
    def share_filled(self) -> float:
        """The fraction of samples that are decoded, 0 to 1."""
        return float(self.filled.float().mean())


class SharedPixelBuffer(PixelBuffer):
    """A `PixelBuffer` in memory shared with forked processes and with those that open its file."""

    def __init__(
        self, samples: int, spec: DataSpec, memory: mmap.mmap, path: Path | None = None
    ) -> None:
        super().__init__(samples, spec, memory)
        self.path = path

    def unlink(self) -> None:
        """Removes the file name; processes that have it open keep the memory."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def size_bytes(samples: int, spec: DataSpec) -> int:
    """The size of a split's decoded pixels in bytes."""
    pixels = samples * math.prod(spec.shape)
    if spec.task == "semantic_segmentation":
        pixels += samples * spec.height * spec.width
    return pixels


def anonymous(samples: int, spec: DataSpec) -> SharedPixelBuffer:
    """A buffer for this process and processes forked from it. The system provides its memory as it
    is written."""
    return SharedPixelBuffer(samples, spec, mmap.mmap(-1, _total(samples, spec)))


def create(samples: int, spec: DataSpec) -> SharedPixelBuffer | None:
    """A buffer in a new file in /dev/shm, or in the temporary folder if /dev/shm is too small; None
    if neither has room. All of it is allocated at once: if memory ran out later, the process that
    writes would be killed by SIGBUS."""
    for folder in (SHARED_FOLDER, Path(tempfile.gettempdir())):
        try:
            file, name = tempfile.mkstemp(prefix="tessera-", dir=folder)
        except OSError:
            continue
        try:
            os.posix_fallocate(file, 0, _total(samples, spec))
            memory = mmap.mmap(file, _total(samples, spec))
            return SharedPixelBuffer(samples, spec, memory, Path(name))
        except OSError:
            os.unlink(name)
        finally:
            os.close(file)
    return None


def open_file(path: Path, samples: int, spec: DataSpec) -> SharedPixelBuffer:
    """Opens the buffer that another process has created for the same split and size. Raises
    TesseraError if the file can't be opened or has another size."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TesseraError(f"the shared images {path} can't be opened: {error.strerror}") from None
    try:
        if os.fstat(file).st_size != _total(samples, spec):
            raise TesseraError(f"the shared images {path} are of another data set or size")
        return SharedPixelBuffer(samples, spec, mmap.mmap(file, _total(samples, spec)), path)
    finally:
        os.close(file)


@dataclass(frozen=True)
class Choice:
    """Where decoded images are kept, "none", "memory" or "device", and the reason in words."""

    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


def choose(
    samples: int, spec: DataSpec, *, cache: str, cache_bytes: int, device: str = "cpu"
) -> Choice:
    """Decides where a split's decoded images are kept, from `cache`, one of `CACHES`.

    "auto" uses memory if the images fit into `cache_bytes`, and the device if they also fit into a
    quarter of its free memory. Raises TesseraError if a cache is requested that doesn't fit.
    """
    if cache not in CACHES:
        raise unknown("cache", cache, CACHES)
    if cache == "none":
        return Choice("none", "as requested")
    need = size_bytes(samples, spec)
    size, budget = _words(need), _words(cache_bytes)
    if need > cache_bytes:
        if cache == "auto":
            return Choice("none", f"{size} of images don't fit the budget of {budget}")
        raise TesseraError(
            f"{size} of decoded images don't fit the cache's budget of {budget}",
            hint="raise cache_bytes, use smaller images, or set the cache to auto or none",
        )
    if cache == "memory":
        return Choice("memory", f"{size} of images, as requested")
    fits = f"{size} of images fit the budget of {budget}"
    if not device.startswith("cuda"):
        note = f", and the device is the {device.upper()}" if cache == "device" else ""
        return Choice("memory", fits + note)
    free = torch.cuda.mem_get_info(torch.device(device))[0]
    if need <= free // _FREE_SHARE:
        return Choice("device", f"{fits}, and a quarter of the device's free {_words(free)}")
    return Choice("memory", f"{fits}, but not a quarter of the device's free {_words(free)}")


def _words(size: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size} bytes"


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _total(samples: int, spec: DataSpec) -> int:
    masks = samples if spec.task == "semantic_segmentation" else 0
    parts = (
        samples * math.prod(spec.shape),
        masks * spec.height * spec.width,
        samples * 2 * 8,
        samples,
    )
    return sum(_aligned(part) for part in parts)
