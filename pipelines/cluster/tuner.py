"""Ray Tune: which settings are tried next, and which trials are stopped early.

In: a space as plain data, and a function that trains one trial. Out: calls of `on_event` with what
happens to each trial. A trial's function runs in its own process beside the driver and takes no
CPU, which is left to the workers that it starts. Must not know what is trained, or where it is
tracked.

Tune unpickles the state of a search when it is restored, which can execute code. So a folder that
others can write to is refused.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from models.core.errors import TesseraError, UsageError
from models.core.spaces import Choice, Integer, LogInteger, Space, Uniform

EPOCH = "epoch"
VALUE = "value"
_NODE_SHARE = 0.0001
"""A trial's process takes this much of its node and no CPU: its workers need them, and a head may
have none. Tune refuses a trial that takes nothing."""
_THREAD_TIMEOUT_SECONDS = "3600"

Payload = TypeVar("Payload")
Report = Callable[[int, float], None]
"""Called with an epoch and its metric. Raises SystemExit if the trial should stop."""
TrainTrial: TypeAlias = Callable[[Payload, str, dict[str, Any], Report], None]
"""Trains one trial: from the search's payload, the trial's id and its settings."""
OnEvent = Callable[[str, str, dict[str, Any]], None]
"""Called with what happened ("start", "result", "complete" or "error"), the trial's id, details."""


@dataclass(frozen=True)
class KnownTrial:
    """A trial that an earlier tuner of the same search started, on this or another machine, and its
    best value so far."""

    id: str
    settings: Mapping[str, Any]
    over: bool
    value: float | None = None


@dataclass(frozen=True)
class TunerOptions:
    """How a search runs.

    Args:
        folder: Where Tune keeps its state; its name is the name of Tune's experiment.
        space: Path of a setting -> its values.
        search: "grid", "random" or "optuna".
        scheduler: "asha" or "none".
        trials: Number of trials; a grid ignores it.
        at_once: Trials that run at the same time.
        direction: "max" or "min": which metric is better.
        most_epochs: Epochs of a full training.
        grace_epochs: Epochs before a trial may be stopped.
        reduction: ASHA keeps one of so many trials at each rung.
        budget_seconds: When the search ends, finished or not.
        keep_processes: Whether the next trial runs in the process of the one before. Only if
            the trial's function leaves nothing running behind.
        known: Trials of the search so far, for a tuner without its own record of them. A grid and
            a random search sample the same settings again: such a trial gets the id that it had.
            Optuna is told the values of those that ended, and samples only the rest.
    """

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
    known: Sequence[KnownTrial] = ()


def run(
    train_trial: TrainTrial[Payload],
    payload: Payload,
    options: TunerOptions,
    on_event: OnEvent,
    *,
    restore: bool,
) -> None:
    """Runs the search to its end. A trial that fails is reported to `on_event`, and the search
    continues. Raises KeyboardInterrupt after a Ctrl-C, once Tune has saved its state."""
    from ray import tune

    trainable = tune.with_resources(_trainable(train_trial, payload, options), _trial_resources())
    path = str(options.folder.absolute())
    if restore:
        check_owned(options.folder)
        tuner = tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True)
    else:
        tuner = _tuner(trainable, options)
    _listeners.append(on_event)
    try:
        with _interruptible():
            tuner.fit()
    finally:
        _listeners.remove(on_event)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raises the KeyboardInterrupt that Tune swallows.

    Tune handles the first Ctrl-C itself: it restores the handler that it found and returns as if
    the search were over. Without a Ctrl-C it leaves its own handler installed. So a handler of ours
    that is installed afterwards shows that there was a Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Tune handles signals in the main thread only
        return

    def own(number: int, frame: Any) -> None:
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, own)
    try:
        yield
        interrupted = signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


def can_restore(folder: Path) -> bool:
    """Whether Tune saved any state of the search."""
    from ray import tune

    return bool(tune.Tuner.can_restore(str(folder.absolute())))


def check_owned(folder: Path) -> None:
    """Raises TesseraError if somebody else may have written the state: reading it executes it.
    Within a folder that only its owner can enter, files may be writable by the group, as some
    systems create them."""
    private = not folder.parent.stat().st_mode & 0o077
    for path in (folder.parent, folder, *folder.rglob("*")):
        status = path.lstat()
        writable_by_others = (
            not private
            and not stat.S_ISLNK(status.st_mode)
            and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        )
        if status.st_uid != os.getuid() or writable_by_others:
            raise TesseraError(
                f"{path} can be written by others, and Ray Tune's state of a search is executed "
                "when it is read",
                hint="resume only a search of your own; if it is, use chown and chmod go-w",
            )


def _trainable(
    train_trial: TrainTrial[Payload], payload: Payload, options: TunerOptions
) -> Callable[[dict[str, Any]], None]:
    space, known = options.space, tuple(options.known)

    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        def report(epoch: int, value: float) -> None:
            tune.report({EPOCH: epoch, VALUE: value})

        # A kept process continues when the function has returned. By default Tune waits 2 s for
        # that, and then gives up the next trial too.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = _THREAD_TIMEOUT_SECONDS
        trial_id = tune.get_context().get_trial_id()
        assert trial_id is not None
        settings = decode(config, space)
        train_trial(payload, _id_of(trial_id, settings, known), settings, report)

    return trial


def _id_of(trial_id: str, settings: Mapping[str, Any], known: Sequence[KnownTrial]) -> str:
    """The id of a trial: that of the known one with the same number and settings, or its own. An id
    is PREFIX_NUMBER, and the prefix differs between two tuners."""
    number = trial_id.rpartition("_")[2]
    for one in known:
        if one.id.rpartition("_")[2] == number and dict(one.settings) == dict(settings):
            return one.id
    return trial_id


def _trial_resources() -> dict[str, float]:
    """Puts trials on this node, where the search's folder is."""
    import ray

    here = ray.util.get_node_ip_address()
    return {f"node:{here}": _NODE_SHARE}


def _tuner(trainable: Any, options: TunerOptions) -> Any:
    from ray import tune

    return tune.Tuner(
        trainable,
        param_space=_encode(options.space, grid=options.search == "grid"),
        tune_config=tune.TuneConfig(
            metric=VALUE,
            mode=options.direction,
            search_alg=_search_algorithm(options),
            scheduler=_scheduler(options),
            num_samples=_samples(options),
            max_concurrent_trials=options.at_once,
            time_budget_s=options.budget_seconds,
            reuse_actors=options.keep_processes,
        ),
        run_config=tune.RunConfig(
            name=options.folder.name,
            storage_path=str(options.folder.parent.absolute()),
            verbose=0,
            # A trial whose process dies is started once more and resumes from its checkpoint.
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[_callback(options.space, tuple(options.known))],
        ),
    )


def _samples(options: TunerOptions) -> int:
    if options.search == "grid":
        return 1
    ended = [one for one in options.known if one.over] if options.search == "optuna" else []
    return max(options.trials - len(ended), 0)


def _ended(options: TunerOptions) -> list[KnownTrial]:
    """Those whose value counts."""
    return [one for one in options.known if one.over and one.value is not None]


def _search_algorithm(options: TunerOptions) -> Any:
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
    ended = _ended(options)
    told = {
        "points_to_evaluate": [_encode_settings(one.settings, options.space) for one in ended],
        "evaluated_rewards": [one.value for one in ended],
    }
    return OptunaSearch(
        metric=VALUE, mode=options.direction, seed=options.seed, **(told if ended else {})
    )


def _scheduler(options: TunerOptions) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if options.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=EPOCH,  # Tune's own iteration count starts again when a search is restored
        max_t=options.most_epochs,
        grace_period=options.grace_epochs,
        reduction_factor=options.reduction,
    )


def _encode(space: Mapping[str, Space], *, grid: bool) -> dict[str, Any]:
    """The space in Tune's classes. Choices are JSON text, because no search algorithm takes a list
    as a value."""
    from ray import tune

    encoded: dict[str, Any] = {}
    for path, values in space.items():
        if isinstance(values, Choice):
            texts = [json.dumps(value) for value in values.values]
            encoded[path] = tune.grid_search(texts) if grid else tune.choice(texts)
        elif isinstance(values, Uniform):
            encoded[path] = tune.uniform(values.low, values.high)
        elif isinstance(values, Integer):
            encoded[path] = tune.randint(values.low, values.high + 1)  # Tune's end is excluded
        elif isinstance(values, LogInteger):
            encoded[path] = tune.lograndint(values.low, values.high + 1)
        else:
            encoded[path] = tune.loguniform(values.low, values.high)
    return encoded


def _encode_settings(settings: Mapping[str, Any], space: Mapping[str, Space]) -> dict[str, Any]:
    """The reverse of `decode`."""
    return {
        path: json.dumps(settings[path]) if isinstance(values, Choice) else settings[path]
        for path, values in space.items()
    }


def decode(config: Mapping[str, Any], space: Mapping[str, Space]) -> dict[str, Any]:
    """The sampled settings, from what `_encode` made."""
    readers: dict[type, Callable[[Any], Any]] = {Choice: json.loads, Integer: int, LogInteger: int}
    return {path: readers.get(type(space[path]), float)(config[path]) for path in space}


_listeners: list[OnEvent] = []
"""Of the searches that run in this process. Tune pickles its callbacks with its state and restores
them from there, so a callback must not hold a listener itself."""


def _notify(what: str, trial_id: str, details: dict[str, Any]) -> None:
    for on_event in _listeners:
        on_event(what, trial_id, details)


def _callback(space: Mapping[str, Space], known: Sequence[KnownTrial]) -> Any:
    from ray import tune

    class Callback(tune.Callback):  # type: ignore[misc]
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._notify("start", trial, {"settings": decode(trial.config, space)})

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any
        ) -> None:
            if VALUE in result:
                self._notify("result", trial, {EPOCH: result[EPOCH], VALUE: result[VALUE]})

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._notify("complete", trial, {})

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            lines = [line for line in str(trial.get_error() or "").splitlines() if line.strip()]
            self._notify("error", trial, {"reason": lines[-1].strip()[:300] if lines else ""})

        def _notify(self, what: str, trial: Any, details: dict[str, Any]) -> None:
            # Imported here: this class is pickled with copies of the module's globals, so the
            # `_listeners` that it would see directly are not those of the module.
            from pipelines.cluster import tuner

            settings = decode(trial.config, space)
            tuner._notify(what, tuner._id_of(trial.trial_id, settings, known), details)

    return Callback()
