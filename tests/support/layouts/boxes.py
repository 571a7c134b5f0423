"""Layouts of data sets with boxes and polygons."""

from __future__ import annotations

from layouts.base import Layout

LAYOUTS: list[Layout] = []
