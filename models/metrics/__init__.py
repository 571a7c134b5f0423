"""Metrics that several tasks share, and metrics from outside the project."""

from models.metrics.custom import higher_is_better, lower_is_better

__all__ = ["higher_is_better", "lower_is_better"]
