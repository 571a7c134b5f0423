"""A model with its predictions and results: what the job computes and the report draws.

In: nothing. Out: `EvaluatedModel`. Must not know how it is computed or drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.evaluation.bootstrap import Array
from pipelines.evaluation.results import EvaluationResult
from pipelines.training.evaluator import Predictions
from pipelines.training.loaded_model import LoadedModel


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its predictions and metrics, on rank 0. `metrics` are of all images, `resampled`
    of each bootstrap sample."""

    model: LoadedModel
    predictions: Predictions
    metrics: dict[str, float]
    resampled: dict[str, Array]
    result: EvaluationResult
