"""Metrics that several tasks share, and metrics from outside the project."""
