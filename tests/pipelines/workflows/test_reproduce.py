"""A reproduction is compared with the original. `tests/jobs/test_lineage.py` makes one."""

from __future__ import annotations

import math

import torch

from pipelines.workflows import reproduce


def test_the_comparison_of_a_reproduction() -> None:
    one = {"a": torch.tensor([1.0, -0.0]), "b": torch.tensor([1, 2])}
    same = {name: tensor.clone() for name, tensor in one.items()}
    assert reproduce.largest_difference(one, same) == 0.0
    assert reproduce.largest_difference(one, {"a": one["a"]}) == math.inf
    assert reproduce.largest_difference(one, {**same, "b": torch.tensor([1.0, 2.0])}) == math.inf
    assert reproduce.largest_difference(one, {**same, "a": torch.tensor([1.0, 0.5])}) == 0.5
    nan = {**same, "a": torch.tensor([1.0, math.nan])}
    assert reproduce.largest_difference(one, nan) == math.inf
    zero = {**same, "a": torch.tensor([1.0, 0.0])}
    assert 0 < reproduce.largest_difference(one, zero) < 1e-300
    before = {"tessera.hardware": "a", "tessera.version.torch": "1", "other": "x"}
    assert reproduce.changed(before, before) == []
    now = {"tessera.hardware": "a", "tessera.version.torch": "2"}
    assert reproduce.changed(before, now) == ["torch was 1, is 2"]
