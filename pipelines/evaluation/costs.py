"""What a prediction costs: parameters, operations, time, memory, bytes on disk.

In: a function, network or `Evaluator`, and an input for it. Out: counts and measurements of all
that it does, on this machine with its current load. Must not know networks, nor what the values
are for.
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
from pipelines.evaluation.gradients import eval_mode
from pipelines.training.hardware import is_out_of_memory

T = TypeVar("T")
BETTER = 1.02
"""A batch size is better than another one if it has this many times its images per second."""


class Latency(NamedTuple):
    """Milliseconds per call: the median, the 95th percentile, and the number of calls."""

    p50_milliseconds: float
    p95_milliseconds: float
    calls: int


class Throughput(NamedTuple):
    """Images per second at the best batch size; `tried` has those of every size."""

    images_per_second: float
    batch_size: int
    tried: dict[int, float]


class Memory(NamedTuple):
    """Bytes. `peak_bytes`: the peak of the device's allocator, or of this whole process on a CPU;
    `growth_bytes`: by how much it is above the level before the call."""

    peak_bytes: int
    growth_bytes: int


def parameters(module: nn.Module) -> int:
    """Trained or frozen; a shared parameter counts once. Buffers don't count."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops(predict: Callable[[T], object], example: T) -> int:
    """Floating-point operations of a call: those of convolutions, matrix products and attention,
    the same on any device. A multiplication and its addition are two. Not counted, as usual:
    activations, norms, pooling, sums, softmax, resizing, and kernels that PyTorch's counter doesn't
    know, like those of deformable convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with _no_gradients(predict), _plain_kernels(), FlopCounterMode(display=False) as counter:
        predict(example)
    return int(counter.get_total_flops())


@contextmanager
def _no_gradients(predict: object) -> Iterator[None]:
    """Disables gradients; a network is in eval mode, so calls don't change its statistics."""
    with torch.no_grad(), eval_mode(predict) if isinstance(predict, nn.Module) else nullcontext():
        yield


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Disables the fused kernels of recurrent layers and of attention in eval mode, which the
    counter doesn't see into. Without them they are matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # `mkldnn.flags` warns about missing GPUs
    try:
        with torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


def latency(
    predict: Callable[[T], object],
    example: T,
    device: str,
    *,
    seconds: float = 2.0,
    least_calls: int = 30,
    most_calls: int = 1000,
    warm_up: int = 5,
) -> Latency:
    """Measures consecutive calls for `seconds`, at least `least_calls` and at most `most_calls`,
    after `warm_up` calls that don't count. For the latency of one image, `example` is a batch of
    one."""
    with _no_gradients(predict):
        times = _times(predict, example, device, seconds, least_calls, most_calls, warm_up)
    middle, late = np.percentile(np.array(times) * 1000, (50, 95))
    return Latency(float(middle), float(late), len(times))


def _times(
    predict: Callable[[T], object],
    example: T,
    device: str,
    seconds: float,
    least_calls: int,
    most_calls: int,
    warm_up: int,
) -> list[float]:
    for _ in range(warm_up):
        predict(example)
    times: list[float] = []
    _wait(device)
    end = time.perf_counter() + seconds
    while len(times) < least_calls or (time.perf_counter() < end and len(times) < most_calls):
        begin = time.perf_counter()
        predict(example)
        _wait(device)
        times.append(time.perf_counter() - begin)
    return times


def _wait(device: str) -> None:
    """Waits until the device has finished all its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def throughput(
    predict: Callable[[T], object],
    make_batch: Callable[[int], T],
    device: str,
    *,
    largest: int = 1024,
    seconds: float = 1.0,
    most_calls: int = 200,
) -> Throughput:
    """Measures images per second for batches of 1, 2, 4 … `largest` images by the median of the
    calls, for `seconds` or `most_calls` each.

    Stops when two sizes in a row are not better than the best one before, or when memory runs out:
    on a CPU before it does, because the system would kill the process. Raises TesseraError if one
    image is too large.
    """
    tried: dict[int, float] = {}
    best, size, on_cpu = 1, 1, torch.device(device).type == "cpu"
    while size <= largest and size <= 4 * best:
        try:
            batch = make_batch(size)
            memory = peak_memory(predict, batch, device)
            with _no_gradients(predict):
                times = _times(predict, batch, device, seconds, 3, most_calls, warm_up=0)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        finally:
            batch = None  # type: ignore[assignment]
            if not on_cpu:
                torch.cuda.empty_cache()
        tried[size] = size / float(np.median(times))
        if tried[size] >= tried[best] * BETTER:
            best = size
        # The next size takes twice as much, and half of the free memory is left to other processes.
        if on_cpu and memory and 4 * memory.growth_bytes > _available_bytes():
            break
        size *= 2
    if not tried:
        raise TesseraError("one image is too large for the memory", hint="use smaller images")
    return Throughput(tried[best], best, tried)


def peak_memory(predict: Callable[[T], object], example: T, device: str) -> Memory | None:
    """Measures one call. On a GPU it is the memory of PyTorch's allocator, including the weights.
    On a CPU it is the resident memory of the process, including Python and PyTorch; None if Linux
    doesn't report it. Resets the peaks that were counted before."""
    if torch.device(device).type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with _no_gradients(predict):
            predict(example)
        _wait(device)
        peak = torch.cuda.max_memory_allocated(device)
        return Memory(peak, peak - before)
    try:
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current level
        before = _status_bytes("VmRSS")
    except OSError:
        return None
    with _no_gradients(predict):
        predict(example)
    peak = _status_bytes("VmHWM")
    return Memory(peak, max(0, peak - before))


def _return_freed_memory() -> None:
    """Returns freed memory to the system: the C library would reuse it, which hides growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(name: str, file: str = "/proc/self/status") -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path(file).read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{file} has no {name}")
    return int(match[1]) * 1024


def _available_bytes() -> int:
    return _status_bytes("MemAvailable", "/proc/meminfo")


def size_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
