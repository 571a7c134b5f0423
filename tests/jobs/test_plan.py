"""`tessera plan` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

from cli_runner import Call


def test_plan_before_packing_names_the_command(call: Call) -> None:
    done = call("plan", "digits", "--gpus", 2, "--loader-workers", 2, "--batch", 128)
    assert done.status == 0, done.err
    assert "2 GPUs x 2 loader workers = 4" in done.out
    assert "12 an epoch, 1,439 samples in batches of 128" in done.out
    assert done.out.splitlines()[-1] == "tessera pack digits --to DIR --shard-samples 1439"


def test_plan_judges_what_is_packed(digits: Path, call: Call) -> None:
    done = call("plan", digits, "--gpus", 8, "--json")
    assert done.status == 0, done.err
    plan = json.loads(done.out)
    assert plan["shards"] == 1
    assert "would get a shard in stock webdataset" in plan["lines"]["readers"]["why"]
    refused = call("plan", digits, "--gpus", 8, "--batch", 4)
    assert refused.status == 2
    assert "a batch of 4 can't be split over 8 workers" in refused.err


def test_plan_refuses_wrong_options(call: Call) -> None:
    assert call("plan", "digits", "--option", "x").status == 2
    assert call("plan", "digits", "--format", "webdatset").status == 2
    assert "nowhere" in call("plan", "nowhere").err
