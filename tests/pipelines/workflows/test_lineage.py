"""`trace` as a function. `tests/jobs/test_lineage.py` tests what `tessera lineage` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.workflows.context import Context
from pipelines.workflows.lineage import trace


def test_a_model_is_traced_to_its_data_and_recipe(trained_home: Path, digits: Path) -> None:
    context = Context.from_environment({"TESSERA_HOME": str(trained_home)})
    facts = trace("digits@challenger", context=context)
    assert (facts["version"], facts["family"]) == ("models:/digits/1", "cnn, tiny")
    assert facts["data"] == f"digits in {digits}"
    assert facts["recipe"]["train.epochs"] == 2
    assert facts["verdict"] == facts["evaluated"] == facts["search"] == ""
    with pytest.raises(TesseraError, match="phantom"):
        trace("phantom", context=context)
