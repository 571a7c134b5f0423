"""`trace` as a function; what `tessera lineage` shows is tested in `tests/jobs/test_lineage.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.workflows.context import Context
from pipelines.workflows.lineage import trace


def test_a_model_is_traced_to_its_data_and_recipe(trained_home: Path, digits: Path) -> None:
    context = Context.from_environment({"TESSERA_HOME": str(trained_home)})
    found = trace("digits@challenger", context=context)
    assert (found["version"], found["family"]) == ("models:/digits/1", "cnn, tiny")
    assert found["data"] == f"digits in {digits}"
    assert found["recipe"]["train.epochs"] == 2
    assert found["verdict"] == found["evaluated"] == found["search"] == ""
    with pytest.raises(TesseraError, match="phantom"):
        trace("phantom", context=context)
