"""`tessera families`: every family with its variants."""

from __future__ import annotations

import json

from cli_runner import Call


def test_families(call: Call) -> None:
    rows = json.loads(call("families", "--json").out)
    assert {"cnn", "resnet"} <= {row["family"] for row in rows}
    assert all({"tiny", "base"} <= set(row["variants"]) and row["about"] for row in rows)
    listed = call("families").out
    assert all(row["family"] in listed and row["about"] in listed for row in rows)
