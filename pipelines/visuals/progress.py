"""Shows a running workflow: a bar in a terminal or a notebook, plain lines elsewhere.

In: the workflow's events, as `pipelines.interfaces.Listener` describes them. Out: text on stderr,
so that stdout stays for the result. Must not know what the workflow does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from models.core.errors import hide_passwords
from pipelines.interfaces import Listener


@contextlib.contextmanager
def show_progress(progress: bool | Listener) -> Iterator[Listener]:
    """The listener that a workflow's argument `progress` means: a display for True, one that
    ignores everything for False, otherwise the given one."""
    if progress is True:
        with Display() as display:
            yield display
    elif progress is False:
        yield _ignore
    else:
        yield _Unredirected(progress)


def _ignore(event: dict[str, Any]) -> None:
    pass


class _Unredirected:
    """A user's listener. What it prints goes where it would go outside of the workflow, which
    redirects stdout to keep Ray's messages out of the result."""

    def __init__(self, listener: Listener) -> None:
        self._listener, self._stdout = listener, sys.stdout

    def __call__(self, event: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(self._stdout):
            self._listener(event)


class Display:
    """A listener that shows what it is told; a context manager.

    A notebook shows a bar only if ipywidgets is installed, and lines otherwise.
    """

    def __init__(self) -> None:
        self.metric = ""
        self.console = Console(stderr=True, highlight=False)
        notebook = self.console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        self.live = self.console.is_terminal or notebook
        self.bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True)),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task("starting", total=None, facts="")
        self.shown_at = 0.0
        self._begin_run()

    def _begin_run(self) -> None:
        self.began: tuple[float, float] | None = None
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
        self.console.print(hide_passwords(text), markup=False, soft_wrap=True)

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event.get("kind")
        if kind == "metrics" and "seen" in event:
            self._metrics(event)
        elif kind == "message":
            self.say(event["text"])
        elif kind == "run":
            self._begin_run()
            self.metric = event["metric"]
            self.bar.update(self.task, description="starting workers", total=None, facts="")
            self.say(f"run {event['name']}")
            if event["page"]:
                self.say(f"watch {event['page']}")
        elif kind == "advance":
            self._advance(event)
        elif kind == "notice":
            self.say(f"note: {event['text']}")
        elif kind == "restart":
            self.began = None
            self.say(f"workers restarted (attempt {event['attempt']}): {event['reason']}")
        elif kind == "group":
            sizes = f"{event['before']} → {event['workers']} workers"
            self.say(f"{sizes} in {event['seconds']:.0f} s: {event['reason']}")
        elif kind == "resume":
            self.began = None
            self.say(f"resumed from {event['checkpoint']} (epoch {event['epoch']})")

    def _advance(self, event: dict[str, Any]) -> None:
        now, done = time.monotonic(), event["done"]
        if not self.live or now - self.shown_at < 0.2:
            return
        # What an earlier, interrupted call did doesn't count as speed of this one.
        self.began = self.began or (now, done)
        since, before = self.began
        rate = (done - before) / (now - since) if now > since else 0.0
        self.shown_at = now
        size, unit = event["total"], event["unit"]
        facts = f"{_amount(done, unit)} of {_amount(size, unit)} {unit}"
        if rate:
            facts += f"  {_amount(rate, unit)} {unit}/s"
        self.bar.update(self.task, description="", total=size, completed=done, facts=facts)

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
        key = f"val/{self.metric}"
        if key in values:
            self.last_value = f"val {self.metric} {values[key]:.4f}"
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
        since, before = self.began
        done = event["seen"] - before
        if done <= 0:
            return None
        return float((time.monotonic() - since) / done * (event["samples"] - event["seen"]))

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


def _amount(value: float, unit: str) -> str:
    return f"{value:.2f}" if unit == "GB" else f"{value:,.0f}"
