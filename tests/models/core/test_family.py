"""Random numbers of a global batch, which don't depend on the number of ranks."""

from __future__ import annotations

import pytest
import torch

from models.core.family import BatchRng, Metric


@pytest.mark.parametrize("name", ["uniform", "normal", "integers"])
def test_ranks_get_their_rows_of_the_global_batch(name: str) -> None:
    shape = (5, 3) if name == "integers" else (3,)
    together = getattr(BatchRng(7, 10, slice(0, 10)), name)(*shape)
    parts = [getattr(BatchRng(7, 10, rows), name)(*shape) for rows in (slice(0, 4), slice(4, 10))]
    assert together.shape == (10, 3)
    assert torch.equal(torch.cat(parts), together)
    assert not torch.equal(getattr(BatchRng(8, 10, slice(0, 10)), name)(*shape), together)


def test_a_metric_knows_which_value_is_better() -> None:
    assert Metric("accuracy", "max").better(0.9, than=0.8)
    assert Metric("loss", "min").better(0.8, than=0.9)
    assert not Metric("loss", "min").better(0.8, than=0.8)
