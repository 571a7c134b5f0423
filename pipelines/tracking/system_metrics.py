"""ROOM: MLflow, its monitors of the machine: CPU, memory, disk, network and GPUs.

In: a function that delivers points, and an interval. Out: `Sampler`, a thread that samples and
delivers. MLflow's own monitor stops at the first failed request; this one keeps what it couldn't
deliver.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.interfaces import Point

_KEPT_SECONDS = 3600


class Sampler(threading.Thread):
    """Samples this machine every `interval_seconds` into metrics `system/…` from `first_step` on.

    If `deliver` raises, its points are kept for up to an hour and sent again with the next sample.
    """

    def __init__(
        self, deliver: Callable[[Sequence[Point]], None], interval_seconds: float, first_step: int
    ) -> None:
        super().__init__(name="system-metrics", daemon=True)
        self._deliver = deliver
        self._interval_seconds = interval_seconds
        self._step = first_step
        self._waiting: deque[Point] = deque(maxlen=max(1, int(_KEPT_SECONDS / interval_seconds)))
        self._stopped = threading.Event()
        self._monitors = _monitors()

    def run(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            self._sample()
            self._deliver_waiting()

    def stop(self, timeout_seconds: float = 15.0) -> None:
        """Takes a last sample. Waits at most `timeout_seconds` for a delivery that hangs."""
        self._stopped.set()
        self.join(timeout=timeout_seconds)
        if not self.is_alive():
            self._sample()
            self._deliver_waiting()

    def _sample(self) -> None:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values.update({f"system/{k}": v for k, v in monitor.aggregate_metrics().items()})
            monitor.clear_metrics()
        self._waiting.append(Point(self._step, int(time.time() * 1000), values))
        self._step += 1

    def _deliver_waiting(self) -> None:
        points = list(self._waiting)
        try:
            self._deliver(points)
        except Exception:  # whatever went wrong: the next sample tries again
            return
        self._waiting.clear()


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        monitors.append(GPUMonitor())
    except Exception:  # no GPU, no driver, no library: each raises an error of its own
        return monitors
    return monitors
