"""Sources made at random: the account adds up, and no label, image or setting is lost in silence.

benchmarks/pack_anything.py does the same with 5,000 sources.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from random_sources import build, check_pack


def run(folder: Path, seed: int) -> tuple[str, list[str]]:
    truth = build(folder / "source", seed)
    outcome, wrong = check_pack(folder / "source", folder / "packed", truth)
    shutil.rmtree(folder)
    return outcome, [f"seed {seed} ({truth.kind}, {truth.strays}): {text}" for text in wrong]


def test_a_few_random_sources(tmp_path: Path) -> None:
    assert [text for seed in range(8) for text in run(tmp_path / str(seed), seed)[1]] == []


@pytest.mark.slow
def test_a_hundred_random_sources(tmp_path: Path) -> None:
    results = [run(tmp_path / str(seed), seed) for seed in range(100, 200)]
    assert [text for _, wrong in results for text in wrong] == []
    packed = sum(outcome == "packed" for outcome, _ in results)
    assert 40 < packed < 95  # the control: some are refused


@pytest.mark.parametrize("seed", range(300, 304))
def test_a_loss_is_seen(tmp_path: Path, seed: int) -> None:
    """The control: the same source is wrong if a label is another, or an image should be there."""
    truth = build(tmp_path / "source", seed)
    truth.refused = ""

    def wrong(to: str) -> list[str]:
        return check_pack(tmp_path / "source", tmp_path / to, truth, allow_unused=("*",))[1]

    assert wrong("one") == []
    path = sorted(truth.images.keys() - truth.damaged)[0]
    _, label = truth.images[path]
    truth.images[path] = ("test", "another" if isinstance(label, str) else ["another"])
    assert any(path in text for text in wrong("two"))
    truth.images["lost.jpg"] = (None, None)
    assert "lost.jpg is lost" in wrong("three")
