"""Metrics that need more than a line: average precision and image quality."""
