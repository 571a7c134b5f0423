"""`promote` and `rollback` as functions. `tests/jobs/test_promote.py` tests what they record."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.promotion import champions
from pipelines.workflows import services
from pipelines.workflows.context import Context
from pipelines.workflows.evaluate import evaluate
from pipelines.workflows.promote import promote, rollback


@pytest.fixture
def context(trained_home: Path) -> Context:
    return Context.from_environment({"TESSERA_HOME": str(trained_home)})


@pytest.mark.slow
def test_only_an_evaluated_version_is_promoted(context: Context, digits: Path) -> None:
    registry = services.open_registry(context)
    (version,) = registry.versions("digits")
    refused = promote(version, context=context)
    assert not refused.passed
    assert "was not evaluated" in refused.why
    evaluate(version, data=digits, report=False, intervals=False, context=context)
    tried = promote("digits", dry_run=True, context=context)
    assert (tried.passed, tried.dry_run, tried.model) == (True, True, "digits")
    assert champions.read_state(registry, "digits").champion is None
    assert promote("digits/1", context=context).passed
    assert registry.version("digits", champions.CHAMPION).number == 1
    assert promote("digits@champion", context=context).why == "it is already the champion"
    with pytest.raises(TesseraError, match="is the first champion"):
        rollback("digits", context=context)


@pytest.mark.slow
def test_a_model_that_does_not_exist_is_refused(context: Context) -> None:
    with pytest.raises(TesseraError, match="phantom"):
        promote("phantom", context=context)
    with pytest.raises(TesseraError, match="phantom"):
        rollback("phantom", context=context)
