"""Random numbers of a sample depend on its number and their purpose, and on nothing else."""

from __future__ import annotations

from pipelines.evaluation.sample_rng import sample_rng


def test_they_depend_on_purpose_and_number_alone() -> None:
    def first(purpose: str, number: int) -> float:
        return float(sample_rng(purpose, number).random())

    assert first("fog", 3) == first("fog", 3)
    assert len({first(purpose, n) for purpose in ("fog", "snow") for n in range(50)}) == 100
