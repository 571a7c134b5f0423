"""`pack` as a function. `tests/pipelines/data/packing` tests what is packed, and how."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from models.core.errors import TesseraError
from pipelines.data import card as cards
from pipelines.workflows import pack as workflows_pack
from pipelines.workflows.context import Context
from pipelines.workflows.pack import pack, suggest_family


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context.from_environment({"TESSERA_HOME": str(tmp_path / "home")})


@pytest.mark.slow
def test_pack_returns_the_path_of_the_data_set(tmp_path: Path, context: Context) -> None:
    events: list[dict[str, Any]] = []
    data = pack(
        "digits", to=tmp_path / "digits", workers=0, progress=events.append, context=context
    )
    assert os.fspath(data) == data.location == str(tmp_path / "digits")
    assert data.card == cards.read(data.location)
    assert data.samples == sum(split.samples for split in data.card.splits.values())
    assert suggest_family(data.card) == "cnn"
    assert {event["kind"] for event in events} == {"message", "advance"}
    last = [event for event in events if event["kind"] == "advance"][-1]
    assert (last["done"], last["unit"]) == (last["total"], "images")
    with pytest.raises(TesseraError, match="is already a packed data set"):
        pack("digits", to=data, workers=0, progress=False, context=context)


@pytest.mark.parametrize(
    ("workers", "address", "wanted"),
    [(0, "head:6379", False), (2, None, True), (None, "h:1", True)],
)
def test_whether_pack_uses_the_cluster(
    workers: int | None, address: str | None, wanted: bool, tmp_path: Path
) -> None:
    environment = {"TESSERA_HOME": str(tmp_path), **({"RAY_ADDRESS": address} if address else {})}
    context = Context.from_environment(environment)
    cluster = workflows_pack._Cluster(context, workers, None, verbose=False)  # type: ignore[arg-type]
    assert cluster.is_wanted == wanted
