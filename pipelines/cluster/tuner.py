"""ROOM: Ray Tune. Which settings are tried next, and which trials are stopped.

In: a space as plain data, and a function that trains one trial. Out: calls of `on_event` with what
became of each. A trial's function runs in a process of its own beside the driver and takes no CPU:
the workers that it starts take them. Must not know what is trained, or where it is tracked.

What Tune keeps of a search is unpickled when it is restored, so a folder that others can write to
is refused.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from models.core.errors import TesseraError, UsageError
from models.core.spaces import Choice, Space, Uniform

EPOCH = "epoch"
VALUE = "value"
_TRIAL_CPUS = 0.01
"""None would be refused; Tune's default of 1 would leave the workers waiting for ever."""
_NODE_SHARE = 0.0001
_END_SECONDS = "3600"

Report = Callable[[int, float], None]
"""Called with an epoch and its metric; raises SystemExit if the trial has to stop."""
Payload = TypeVar("Payload")
Body = Callable[[Payload, str, dict[str, Any], Report], None]
"""Trains one trial, given a payload, the trial's id, its settings and `Report`."""
OnEvent = Callable[[str, str, dict[str, Any]], None]
"""Called with an event ("start", "result", "complete", "error"), the trial's id, and details."""


@dataclass(frozen=True)
class TunerOptions:
    """What the tuner searches, and how. `folder` is Tune's own folder of the search."""

    folder: Path
    space: Mapping[str, Space]
    search: str
    scheduler: str
    trials: int
    at_once: int
    direction: str
    most_epochs: int
    grace_epochs: int
    reduction: float
    seed: int
    budget_seconds: float | None = None
    keep_processes: bool = False
    """A trial's process goes on with the next one, if the body leaves nothing behind that runs."""


def run(
    body: Body[Payload],
    payload: Payload,
    options: TunerOptions,
    on_event: OnEvent,
    *,
    restore: bool,
) -> None:
    """Runs the search to its end. Of trials that fail `on_event` is told; the search goes on. A Ctrl-C
    ends it as KeyboardInterrupt, once Tune has written what it needs to go on."""
    from ray import tune

    trainable = tune.with_resources(_trainable(body, payload, options.space), _resources())
    path = str(options.folder.absolute())
    if restore:
        check_owned(options.folder)
        tuner = tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True)
    else:
        tuner = _tuner(trainable, options)
    _listeners.append(on_event)
    try:
        with _interrupted():
            tuner.fit()
    finally:
        _listeners.remove(on_event)


@contextmanager
def _interrupted() -> Iterator[None]:
    """Makes a KeyboardInterrupt again of a Ctrl-C that Tune has taken. It takes the first for itself,
    puts the handler back that there was, and ends as if the search were over; without a Ctrl-C it
    leaves its own handler behind, which nobody listens to any more."""
    if threading.current_thread() is not threading.main_thread():
        yield  # there Tune takes none
        return

    def own(number: int, frame: Any) -> None:
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, own)
    try:
        yield
        taken = signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    if taken:
        raise KeyboardInterrupt


def can_restore(folder: Path) -> bool:
    """Whether Tune wrote anything of the search."""
    from ray import tune

    return bool(tune.Tuner.can_restore(str(folder.absolute())))


def check_owned(folder: Path) -> None:
    """Refuses state that somebody else may have written: reading it executes it. Below a folder
    that only its owner can enter, files may be writable by a group, as some systems make them."""
    private = not folder.parent.stat().st_mode & 0o077
    for path in (folder.parent, folder, *folder.rglob("*")):
        found = path.lstat()
        loose = (
            not private
            and not stat.S_ISLNK(found.st_mode)
            and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        )
        if found.st_uid != os.getuid() or loose:
            raise TesseraError(
                f"{path} can be written by others, and what Ray Tune keeps of a search is executed "
                "when it is read",
                hint="go on only with a search of your own: chown and chmod go-w, if it is",
            )


def _trainable(
    body: Body[Payload], payload: Payload, space: Mapping[str, Space]
) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        def report(epoch: int, value: float) -> None:
            tune.report({EPOCH: epoch, VALUE: value})

        # A process that is kept goes on when the body has ended. Tune gives up after 2 s, and with it
        # the next trial.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = _END_SECONDS
        number = tune.get_context().get_trial_id()
        assert number is not None
        body(payload, number, decode(config, space), report)

    return trial


def _resources() -> dict[str, float]:
    """On this node, where the search's folder is."""
    import ray

    here = ray.util.get_node_ip_address()
    return {"CPU": _TRIAL_CPUS, f"node:{here}": _NODE_SHARE}


def _tuner(trainable: Any, options: TunerOptions) -> Any:
    from ray import tune

    return tune.Tuner(
        trainable,
        param_space=_encode(options.space, grid=options.search == "grid"),
        tune_config=tune.TuneConfig(
            metric=VALUE,
            mode=options.direction,
            search_alg=_search(options),
            scheduler=_scheduler(options),
            num_samples=1 if options.search == "grid" else options.trials,
            max_concurrent_trials=options.at_once,
            time_budget_s=options.budget_seconds,
            reuse_actors=options.keep_processes,
        ),
        run_config=tune.RunConfig(
            name=options.folder.name,
            storage_path=str(options.folder.parent.absolute()),
            verbose=0,
            # A trial whose process dies is started once more, and goes on from its checkpoint.
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[_listener(options.space)],
        ),
    )


def _search(options: TunerOptions) -> Any:
    if options.search != "optuna":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(
            max_concurrent=options.at_once, constant_grid_search=True, random_state=options.seed
        )
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise UsageError(
            "--search optuna needs optuna, which isn't installed",
            hint="pip install 'tessera-train[optuna]', or --search random",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch(metric=VALUE, mode=options.direction, seed=options.seed)


def _scheduler(options: TunerOptions) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if options.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=EPOCH,  # Tune's own count begins anew when a search is restored
        max_t=options.most_epochs,
        grace_period=options.grace_epochs,
        reduction_factor=options.reduction,
    )


def _encode(space: Mapping[str, Space], *, grid: bool) -> dict[str, Any]:
    """Choices as JSON text: a value may be a list, which no tuner takes."""
    from ray import tune

    encoded: dict[str, Any] = {}
    for path, values in space.items():
        if isinstance(values, Choice):
            texts = [json.dumps(value) for value in values.values]
            encoded[path] = tune.grid_search(texts) if grid else tune.choice(texts)
        elif isinstance(values, Uniform):
            encoded[path] = tune.uniform(values.low, values.high)
        else:
            encoded[path] = tune.loguniform(values.low, values.high)
    return encoded


def decode(config: Mapping[str, Any], space: Mapping[str, Space]) -> dict[str, Any]:
    """The settings that were sampled."""
    return {
        path: json.loads(config[path]) if isinstance(values, Choice) else float(config[path])
        for path, values in space.items()
    }


_listeners: list[OnEvent] = []
"""Of the search that runs in this process. A listener is kept with Tune's state and comes back from
there, so it holds nothing of this process."""


def _tell(what: str, trial: str, about: dict[str, Any]) -> None:
    for on_event in _listeners:
        on_event(what, trial, about)


def _listener(space: Mapping[str, Space]) -> Any:
    from ray import tune

    class Listener(tune.Callback):  # type: ignore[misc]
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._tell("start", trial, {"settings": decode(trial.config, space)})

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any
        ) -> None:
            if VALUE in result:
                self._tell("result", trial, {EPOCH: result[EPOCH], VALUE: result[VALUE]})

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._tell("complete", trial, {})

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            lines = [line for line in str(trial.get_error() or "").splitlines() if line.strip()]
            self._tell("error", trial, {"reason": lines[-1].strip()[:300] if lines else ""})

        def _tell(self, what: str, trial: Any, about: dict[str, Any]) -> None:
            from pipelines.cluster import (
                tuner as cluster_tuner,  # this class is pickled with copies of its globals
            )

            cluster_tuner._tell(what, trial.trial_id, about)

    return Listener()
