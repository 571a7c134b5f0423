"""`trace` as a function. `tests/jobs/test_lineage.py` tests what `tessera lineage` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.workflows.context import Context
from pipelines.workflows.lineage import trace


def test_a_model_is_traced_to_its_data_and_recipe(trained_home: Path, digits: Path) -> None:
    context = Context.from_environment({"TESSERA_HOME": str(trained_home)})
    lineage = trace("digits@challenger", context=context)
    assert (lineage.version, lineage.family) == ("models:/digits/1", "cnn, tiny")
    assert lineage.data == f"digits in {digits}"
    assert lineage.settings["train.epochs"] == 2
    assert lineage.verdict == lineage.evaluated == lineage.search == ""
    with pytest.raises(TesseraError, match="phantom"):
        trace("phantom", context=context)
