"""Evaluation of trained models: metrics with intervals, slices, robustness, costs, a report."""
