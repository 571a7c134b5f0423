"""The syntax of a model reference, the same in every verb."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError, UsageError
from pipelines.tracking.memory import MemoryRegistry
from pipelines.workflows.model_reference import ModelReference, parse, resolve


@pytest.mark.parametrize("prefix", ["", "models:/"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("photos", ModelReference("photos")),
        ("photos/2", ModelReference("photos", 2)),
        ("photos@champion", ModelReference("photos", alias="champion")),
        ("my photos-2.b/12", ModelReference("my photos-2.b", 12)),
    ],
)
def test_valid_references_are_parsed(prefix: str, text: str, expected: ModelReference) -> None:
    assert parse(prefix + text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/2",
        "@champion",
        "photos/",
        "photos/0",
        "photos/-1",
        "photos/two",
        "photos/1/2",
        "photos@",
        "photos/².",
    ],
)
def test_invalid_references_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="does not name a model"):
        parse(text)


def test_a_reference_is_resolved(tmp_path: Path) -> None:
    registry = MemoryRegistry(tmp_path / "registry")
    model = tmp_path / "model"
    model.mkdir()
    for _ in range(3):
        registry.register("photos", model, run_id="r", tags={})
    registry.alias("photos", "champion", 2)
    assert resolve(registry, "photos").number == 3
    assert resolve(registry, "photos/1").number == 1
    assert resolve(registry, "models:/photos@champion").number == 2
    for missing in ("photos/7", "photos@best", "nobody"):
        with pytest.raises(TesseraError):
            resolve(registry, missing)
