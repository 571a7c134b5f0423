"""Plots of a search, as PNG files.

In: a space and its trials. Out: one PNG per plot; plots that need more trials are left out. Must
not know where the files go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.core.family import Metric
from models.core.spaces import Choice, LogInteger, LogUniform, Space
from pipelines.search.trials import Trial, is_better, ranked
from pipelines.visuals import plots

if TYPE_CHECKING:
    import numpy as np

BEST, OTHERS, STOPPED = "#c2410c", "#1f6f8b", "#b6bdc9"
LEAST_FOR_IMPORTANCE = 8
"""With fewer trials the importance of a setting can't be estimated."""
TREES = 200


def draw(
    trials: Sequence[Trial], space: Mapping[str, Space], metric: Metric, folder: Path
) -> list[Path]:
    """Draws all plots that these trials allow, without those that failed. Returns their files."""
    scored = [t for t in trials if t.value is not None and t.status != "failed"]
    if not scored:
        return []
    plot_functions: dict[str, Callable[[Path], None]] = {
        "history": lambda path: history(scored, metric, path),
        "learning_curves": lambda path: curves(scored, metric, path),
        "parallel_coordinates": lambda path: parallel(scored, space, metric, path),
    }
    if len(scored) >= LEAST_FOR_IMPORTANCE:
        plot_functions["importance"] = lambda path: draw_importance(scored, space, metric, path)
    files = []
    for name, plot in plot_functions.items():
        files.append(folder / f"{name}.png")
        plot(files[-1])
    return files


def history(trials: Sequence[Trial], metric: Metric, path: Path) -> None:
    """The metric of each trial, and the best so far."""
    from matplotlib.ticker import MaxNLocator

    figure = plots.new_figure(6.4, 3.6)
    axis = figure.subplots()
    order = sorted(trials, key=lambda t: t.number)
    best: list[float] = []
    for trial in order:
        value = _value(trial)
        best.append(value if not best or is_better(value, best[-1], metric.direction) else best[-1])
    numbers = [t.number for t in order]
    colours = [STOPPED if t.status == "stopped" else OTHERS for t in order]
    axis.scatter(numbers, [_value(t) for t in order], c=colours, s=22, clip_on=False)
    axis.step(numbers, best, where="post", color=BEST, linewidth=1.5, label="best so far")
    axis.scatter([], [], c=STOPPED, s=22, label="stopped early")
    axis.legend(fontsize=8, frameon=False)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _finish(axis, "trial", metric.name)
    plots.save(figure, path)


def curves(trials: Sequence[Trial], metric: Metric, path: Path) -> None:
    """The metric by epoch, the best trial on top."""
    from matplotlib.ticker import MaxNLocator

    figure = plots.new_figure(6.4, 3.6)
    axis = figure.subplots()
    first = ranked(trials, metric)[0]
    for trial in reversed(ranked(trials, metric)):
        colour = BEST if trial is first else STOPPED if trial.status == "stopped" else OTHERS
        epochs, values = zip(*sorted(trial.curve))
        axis.plot(
            epochs,
            values,
            color=colour,
            linewidth=2.0 if trial is first else 1.0,
            marker="o",
            markersize=2.5,
            clip_on=False,
            label=f"trial {first.number}, the best" if trial is first else None,
        )
    axis.legend(fontsize=8, frameon=False)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _finish(axis, "epoch", metric.name)
    plots.save(figure, path)


def parallel(
    trials: Sequence[Trial], space: Mapping[str, Space], metric: Metric, path: Path
) -> None:
    """One line per trial through its settings to its metric; better trials are darker."""
    columns = [*space, metric.name]
    figure = plots.new_figure(max(6.4, 1.5 * len(columns)), 4.2)
    axis = figure.subplots()
    values = [_value(t) for t in trials]
    low, high = min(values), max(values)
    for trial in reversed(ranked(trials, metric)):
        share = (_value(trial) - low) / (high - low) if high > low else 1.0
        good = share if metric.direction == "max" else 1 - share
        heights = [_height(trial.settings[name], space[name]) for name in space] + [share]
        axis.plot(
            range(len(columns)),
            heights,
            color=BEST if good == 1.0 else OTHERS,
            alpha=0.15 + 0.85 * good**2,
            linewidth=1.4,
            clip_on=False,
        )
    for column, name in enumerate(columns):
        axis.axvline(column, color="#555", linewidth=0.8)
        for height, text in _marks(space[name]) if name in space else _ends(low, high):
            axis.annotate(
                text, (column, height), xytext=(4, 0), textcoords="offset points", fontsize=7
            )
    axis.set_xticks(range(len(columns)), [_short(name) for name in columns], fontsize=8)
    axis.set_yticks([])
    axis.set_ylim(-0.04, 1.04)
    axis.spines[:].set_visible(False)
    axis.set_title("settings of the trials", fontsize=10, loc="left")
    plots.save(figure, path)


def draw_importance(
    trials: Sequence[Trial], space: Mapping[str, Space], metric: Metric, path: Path
) -> None:
    shares, explained = importance(trials, space)
    figure = plots.new_figure(6.4, 0.8 + 0.34 * len(shares))
    axis = figure.subplots()
    order = sorted(shares, key=lambda name: shares[name])
    axis.barh([_short(n) for n in order], [shares[n] for n in order], color=OTHERS, height=0.6)
    axis.set_xlim(0, 1)
    _finish(axis, "share of the explained variance", "")
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title(
        f"importance of each setting for {metric.name}; "
        f"they explain {max(explained, 0.0):.0%} of it in {len(trials)} trials",
        fontsize=9,
        loc="left",
    )
    plots.save(figure, path)


def importance(
    trials: Sequence[Trial], space: Mapping[str, Space]
) -> tuple[dict[str, float], float]:
    """Returns (share of each setting, out-of-bag R²): how much worse a random forest predicts the
    metric if the values of a setting are shuffled (Breiman, Random Forests, 2001)."""
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    known = np.array([[_height(t.settings[name], space[name]) for name in space] for t in trials])
    values = np.array([_value(t) for t in trials])
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0, min_samples_leaf=2)
    forest.fit(known, values)
    losses: np.ndarray[Any, Any] = permutation_importance(
        forest, known, values, n_repeats=20, random_state=0
    ).importances_mean
    losses = losses.clip(min=0)
    total = float(losses.sum())
    shares = losses / total if total > 0 else losses
    return dict(zip(space, map(float, shares))), float(forest.oob_score_)


def _value(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value


def _height(value: Any, space: Space) -> float:
    """The position of a value in its space, from 0 to 1."""
    if isinstance(space, Choice):
        index = [json.dumps(v) for v in space.values].index(json.dumps(value))
        return index / max(len(space.values) - 1, 1)
    low, high, number = space.low, space.high, float(value)
    if isinstance(space, LogUniform | LogInteger):
        low, high, number = math.log(low), math.log(high), math.log(number)
    return (number - low) / (high - low)


def _marks(space: Space) -> list[tuple[float, str]]:
    if isinstance(space, Choice):
        return [(_height(value, space), json.dumps(value)[:18]) for value in space.values]
    return _ends(space.low, space.high)


def _ends(low: float, high: float) -> list[tuple[float, str]]:
    return [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]


def _short(name: str) -> str:
    return ".\n".join(name.split(".")[-2:]).replace("model.\n", "")


def _finish(axis: Any, below: str, beside: str) -> None:
    axis.set_xlabel(below, fontsize=8, labelpad=2)
    axis.set_ylabel(beside.replace("_", " "), fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["right", "top"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
