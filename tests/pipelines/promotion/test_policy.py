"""The policy of promotions: reading it from a file, its defaults, and errors with a hint."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models.core.errors import UsageError
from pipelines.promotion import policy
from pipelines.promotion.policy import Policy


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("floor: {accuracy: 0.9}", "did you mean 'floors'"),
        ("largest_losses: {class: 0.1}", "did you mean 'largest_losses.classes'"),
        ("margin: much", "margin = 'much'"),
        ("confidence: 95", "confidence = 95"),
        ("leakage: -1", "leakage = -1"),
        ("floors: {accuracy: .nan}", "floors.accuracy"),
        ("- 1", "not a mapping"),
        ("a: [", "is not valid YAML"),
        ("!!python/object/apply:os.system ['touch marker']", "is not valid YAML"),
    ],
)
def test_an_invalid_policy_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "promotion.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        policy.read(file)
    assert reason in f"{error.value.message} {error.value.hint}"
    assert not (tmp_path / "marker").exists()


def test_a_policy_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "promotion.yaml"
    file.write_text("floors: {accuracy: 0.9}\nlargest_losses: {classes: 0.1}\n")
    read = policy.read(file)
    assert (read.floors, read.largest_losses.classes) == ({"accuracy": 0.9}, 0.1)
    assert not read.needs_costs
    assert not read.needs_robustness
    assert Policy(floors={"robustness": 0.5}).needs_robustness
    assert Policy(ceilings={"latency_p95_ms": 5}).needs_costs
    assert Policy(ceilings={"size_bytes": 5}).needs_costs
    file.write_text("")
    assert policy.read(file) == Policy()


def test_the_policy_in_the_docs_is_valid() -> None:
    """The defaults in the docs are those of the code, too."""
    page = (Path(__file__).parents[3] / "docs" / "policy.md").read_text()
    shown = policy.build(yaml.safe_load(page.partition("```yaml")[2].partition("```")[0]))
    assert shown.largest_losses.size == 1.0
    own = policy.default("classification")
    assert own.largest_losses.classes == shown.largest_losses.classes
    assert (own.margin, own.confidence, own.leakage) == (
        shown.margin,
        shown.confidence,
        shown.leakage,
    )
    others = {loss for task, loss in policy.CLASS_LOSSES.items() if task != "classification"}
    assert others == {0.1}
    assert "0.1 for detection and segmentation" in page
