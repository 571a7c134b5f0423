"""The one display of a training: a bar on a terminal, plain lines elsewhere.

In: the run's events. Out: text on stderr, so that stdout stays for the result.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column


class Display:
    """A listener for `pipelines.tracking.events.Uploader`; a context manager."""

    def __init__(self, primary: str, *, quiet: bool = False) -> None:
        self.primary, self.quiet = primary, quiet
        self.console = Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True)),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task("starting workers", total=None, facts="")
        self.began: tuple[float, int] | None = None
        self.train: dict[str, Any] = {}
        self.speeds: list[float] = []
        self.last_value = ""

    def __enter__(self) -> Display:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.bar.stop()

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event.get("kind")
        if kind == "metrics" and "seen" in event:
            self._metrics(event)
        elif kind == "notice":
            self.say(f"note: {event['text']}")
        elif kind == "restart":
            self.began = None
            self.say(f"workers started again (attempt {event['attempt']}): {event['reason']}")
        elif kind == "resume":
            self.began = None
            self.say(f"going on from {event['checkpoint']} (epoch {event['epoch']})")

    def _metrics(self, event: dict[str, Any]) -> None:
        values = event["values"]
        if "train/loss" in values or any(k.startswith("train/") for k in values):
            if self.began is None:
                self.began = (time.monotonic(), event["seen"])
            if event["epoch"] != self.train.get("epoch"):
                self.speeds = []
            self.speeds.append(values["train/images_per_second"])
            self.train = {**values, "step": event["step"], "epoch": event["epoch"]}
            self._show(event)
        key = f"val/{self.primary}"
        if key in values:
            self.last_value = f"val {self.primary} {values[key]:.4f}"
            self._show(event)
            facts = "  ".join(self._facts(event))
            self.say(f"epoch {event['epoch']}/{event['epochs']}  {self.last_value}  {facts}")

    def _facts(self, event: dict[str, Any]) -> list[str]:
        loss = next((v for k, v in self.train.items() if k.endswith("loss")), None)
        parts = [f"step {self.train.get('step', 0)}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if self.speeds:  # of the epoch so far: the window at its end may be two steps short
            parts.append(f"{statistics.median(self.speeds):,.0f} images/s")
            parts.append(f"waiting for data {self.train['train/data_wait_share']:.0%}")
        left = self._seconds_left(event)
        if left is not None:
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return parts

    def _seconds_left(self, event: dict[str, Any]) -> float | None:
        if self.began is None:
            return None
        at, seen = self.began
        done = event["seen"] - seen
        if done <= 0:
            return None
        return float((time.monotonic() - at) / done * (event["samples"] - event["seen"]))

    def _show(self, event: dict[str, Any]) -> None:
        if not self.live:
            return
        # Two lines, so that it all fits beside the bar in 80 columns.
        facts = self._facts(event)
        half = (len(facts) + 1) // 2
        lines = ["  ".join(facts[:half]), "  ".join([*facts[half:], self.last_value])]
        # A validation event counts its epoch as done already.
        epoch = min(event["epoch"] + 1, event["epochs"])
        self.bar.update(
            self.task,
            description=f"epoch {epoch}/{event['epochs']}",
            total=event["samples"],
            completed=event["seen"],
            facts="\n".join(lines),
        )
