"""Layouts of data sets with masks, of pairs of images, and of unusual image files."""

from __future__ import annotations

from layouts.base import Layout

LAYOUTS: list[Layout] = []
