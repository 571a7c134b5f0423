"""What a training says of its machine, and how it tells a lack of memory."""

from __future__ import annotations

import os

import pytest
import torch

from pipelines.training import hardware


def test_the_machine_is_described() -> None:
    assert hardware.describe().startswith(f"{os.cpu_count()} cores of ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"), True),
        (RuntimeError("shapes don't match"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert hardware.is_out_of_memory(error) is expected


def test_memory_that_no_machine_has_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert hardware.is_out_of_memory(caught.value)
