"""What an answer costs: parameters, multiplications, time, memory, bytes on disk.

In: something that is asked, and something to ask it. Out: counts and measurements. What is asked is
a function, a network or an `Evaluator` (`evaluation.py`); the figures are of all that it does, and of this
machine, as busy as it is. Must not know networks, nor what is done with the figures.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from models.core.errors import TesseraError
from pipelines.evaluation.gradients import answering

T = TypeVar("T")
BETTER = 1.02
"""A batch is better than another from so many times its images a second."""


class Latency(NamedTuple):
    """Milliseconds from question to answer: the median, the 95th percentile, and how many calls."""

    p50_milliseconds: float
    p95_milliseconds: float
    calls: int


class Throughput(NamedTuple):
    """Images a second at the batch size where they are most. `tried`: of every size."""

    images_per_second: float
    batch_size: int
    tried: dict[int, float]


class Memory(NamedTuple):
    """Bytes. `peak_bytes`: what the device's allocator, or this whole process, had at once;
    `growth_bytes`: how much of it was not there before the call."""

    peak_bytes: int
    growth_bytes: int


def parameters(module: nn.Module) -> int:
    """Trained or frozen; one that is used twice counts once. Buffers don't count."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops(ask: Callable[[T], object], example: T) -> int:
    """Floating-point operations of a call, a multiplication and its addition being two: those of
    convolutions, matrix products and attention, on any device the same. Not counted, as usual:
    activations, norms, pools, sums, softmax, resizing, and kernels that PyTorch's counter doesn't
    know, like those of deformable convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with _asked(ask), _plain_kernels(), FlopCounterMode(display=False) as counter:
        ask(example)
    return int(counter.get_total_flops())


@contextmanager
def _asked(ask: object) -> Iterator[None]:
    """Whatever is asked keeps no gradients; a network answers, and is not trained by being asked."""
    with torch.no_grad(), answering(ask) if isinstance(ask, nn.Module) else nullcontext():
        yield


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Recurrent layers, and attention layers that answer, go through kernels of their own, in which
    the counter would see nothing. Without those they are matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # `mkldnn.flags` warns of GPUs that aren't there
    try:
        with torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


def latency(
    ask: Callable[[T], object],
    example: T,
    device: str,
    *,
    seconds: float = 2.0,
    least_calls: int = 30,
    most_calls: int = 1000,
    warm_up: int = 5,
) -> Latency:
    """Of one call after the other, for `seconds`, but at least `least_calls` of them and no more than
    `most_calls`, after `warm_up` that don't count. `example` is a batch of one image, where it shall
    be the time of one."""
    with _asked(ask):
        times = _times(ask, example, device, seconds, least_calls, most_calls, warm_up)
    middle, late = np.percentile(np.array(times) * 1000, (50, 95))
    return Latency(float(middle), float(late), len(times))


def _times(
    ask: Callable[[T], object],
    example: T,
    device: str,
    seconds: float,
    least_calls: int,
    most_calls: int,
    warm_up: int,
) -> list[float]:
    for _ in range(warm_up):
        ask(example)
    times: list[float] = []
    _wait(device)
    end = time.perf_counter() + seconds
    while len(times) < least_calls or (time.perf_counter() < end and len(times) < most_calls):
        begin = time.perf_counter()
        ask(example)
        _wait(device)
        times.append(time.perf_counter() - begin)
    return times


def _wait(device: str) -> None:
    """Until the device has done all that it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def throughput(
    ask: Callable[[T], object],
    make_batch: Callable[[int], T],
    device: str,
    *,
    largest: int = 1024,
    seconds: float = 1.0,
    most_calls: int = 200,
) -> Throughput:
    """Images a second for batches of 1, 2, 4 … `largest` images, `seconds` or `most_calls` long each,
    by the median of its calls. Ends where two
    sizes in a row are no better than one before, or where memory doesn't suffice: on a CPU before it
    is used up, as the system would end the process. Raises TesseraError where one image is too much."""
    tried: dict[int, float] = {}
    best, size, on_cpu = 1, 1, torch.device(device).type == "cpu"
    while size <= largest and size <= 4 * best:
        try:
            batch = make_batch(size)
            memory = peak_memory(ask, batch, device)
            with _asked(ask):
                times = _times(ask, batch, device, seconds, 3, most_calls, warm_up=0)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            break
        finally:
            batch = None  # type: ignore[assignment]
            if not on_cpu:
                torch.cuda.empty_cache()
        tried[size] = size / float(np.median(times))
        if tried[size] >= tried[best] * BETTER:
            best = size
        # The next size takes twice as much, and half of what is left is for others.
        if on_cpu and memory and 4 * memory.growth_bytes > _available_bytes():
            break
        size *= 2
    if not tried:
        raise TesseraError("one image is too much for the memory", hint="give smaller images")
    return Throughput(tried[best], best, tried)


def _out_of_memory(error: BaseException) -> bool:
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def peak_memory(ask: Callable[[T], object], example: T, device: str) -> Memory | None:
    """Of one call. On a GPU it is what PyTorch's allocator gave out, the network's weights among it;
    on a CPU the process's resident memory, Python and PyTorch among it, for which Linux is asked:
    None where it doesn't tell. Forgets the peaks that were counted before."""
    if torch.device(device).type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with _asked(ask):
            ask(example)
        _wait(device)
        peak = torch.cuda.max_memory_allocated(device)
        return Memory(peak, peak - before)
    try:
        _give_back_freed()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
        before = _status_bytes("VmRSS")
    except OSError:
        return None
    with _asked(ask):
        ask(example)
    peak = _status_bytes("VmHWM")
    return Memory(peak, max(0, peak - before))


def _give_back_freed() -> None:
    """What was freed but is kept by the C library would be used again, and no growth be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(name: str, file: str = "/proc/self/status") -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(file).read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{file} has no {name}")
    return int(found[1]) * 1024


def _available_bytes() -> int:
    return _status_bytes("MemAvailable", "/proc/meminfo")


def size_bytes(folder: Path) -> int:
    """Of all files in a folder and below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
