"""What crosses the process border of an evaluation job.

In: nothing. Out: `EvaluationPayload`, which is sent to every worker, and `EvaluationResults`, which
rank 0 returns. Both are pickled. Must not know torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.evaluation.results import Comparison, EvaluationResult


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder, whose files must have `digest`. `judge` is the folder of its judge."""

    name: str
    folder: Path
    digest: str
    judge: Path | None = None


@dataclass(frozen=True)
class EvaluationPayload:
    """What is evaluated, and what is measured beside the metrics.

    Args:
        models: The first one is compared with each of the others.
        data: Folder or address of the data set.
        intervals: Whether there are confidence intervals, and slices.
        robustness: Images that are corrupted and attacked; 0 for none.
        costs: Whether time and memory are measured.
        fields: Slices by more than the images: field -> sample key -> value.
        confidence: Of the intervals of differences between models.
        report: Folder for the page, its data and its images; None for no report.
        cache: What `cache_payload` returned, for remote shards.
        storage: Address in an object store through which the workers get the models and return the
            report; empty if they see the folders.
    """

    models: tuple[ModelFiles, ...]
    data: str
    split: str = "test"
    intervals: bool = True
    robustness: int = 0
    costs: bool = False
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    confidence: float = 0.95
    report: Path | None = None
    cache: Mapping[str, Any] = field(default_factory=dict)
    storage: str = ""


@dataclass(frozen=True)
class EvaluationResults:
    """A result per model, and the comparison of the first model with each of the others; empty on
    all ranks but 0."""

    models: tuple[EvaluationResult, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
