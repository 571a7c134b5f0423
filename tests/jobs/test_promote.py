"""Promotion with a real registry: what it records, and that it can't be deceived."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import rank_work
from cli_runner import Call
from PIL import Image

from pipelines import recipe as recipes
from pipelines import tag_names
from pipelines.data.packing import pack
from pipelines.interfaces import World
from pipelines.promotion import gate
from pipelines.tracking import mlflow_store
from pipelines.tracking.mlflow_registry import MlflowRegistry
from pipelines.training import loaded_model
from pipelines.workflows import evaluate, promote, services, train
from pipelines.workflows.context import Context

pytestmark = pytest.mark.slow

BETTER, WORSE = 2, 1


@pytest.fixture(scope="module")
def home(trained_home: Path, digits: Path) -> Path:
    """Two versions of `digits`: a poor one, then a good one that replaced it as champion.
    `fresh` has the same two and no champion."""
    registry = services.open_registry(Context.from_environment())
    evaluate.evaluate(f"digits/{WORSE}", data=digits, report=False, intervals=False)
    assert fit(digits, 10) == BETTER
    for number in (WORSE, BETTER):
        version = registry.version("digits", number)
        folder = registry.download(version, trained_home / f"version-{number}")
        registry.register("fresh", folder, run_id=version.run_id, tags=dict(version.tags))
        assert promote.promote(f"digits/{number}").passed
    return trained_home


def fit(
    data: Path, epochs: int, *, on: Path | None = None, model: str = "digits", **changes: Any
) -> int:
    """Trains and evaluates on the same or other data; returns the version."""
    recipe = recipes.start("cnn", "tiny").with_overrides(
        {"data.path": str(data), "train.epochs": epochs, "workers.count": 0, **changes}
    )
    version = train.train(recipe, model=model, progress=False).version
    evaluate.evaluate(f"{model}/{version.number}", data=on or data, report=False, intervals=False)
    return version.number


def register_copy(home: Path, of: int, *, without: str = "") -> int:
    """Registers the files of a version once more, without one of its tags; returns the number."""
    registry = services.open_registry(Context.from_environment())
    version = registry.version("digits", of)
    tags = {name: value for name, value in version.tags.items() if name != without}
    folder = home / f"version-{of}" / f"digits-{of}"
    return registry.register("digits", folder, run_id=version.run_id, tags=tags).number


def champion(call: Call, model: str = "digits") -> int | None:
    rows = json.loads(call("registry", model, "--json").out)
    held = [row["version"] for row in rows if "champion" in row["aliases"].split(", ")]
    return held[0] if held else None


def test_the_decision_is_a_run_with_its_policy_verdict_and_report(
    home: Path, digits: Path, call: Call, tmp_path: Path
) -> None:
    before = dict(services.open_registry(Context.from_environment()).version("fresh", WORSE).tags)
    dry = call("promote", f"fresh/{WORSE}", "--dry-run")
    assert (dry.status, "would be promoted" in dry.out) == (0, True)
    assert (
        dict(services.open_registry(Context.from_environment()).version("fresh", WORSE).tags)
        == before
    )
    assert champion(call, "fresh") is None

    anything = call("promote", f"fresh/{WORSE}", "--margin", "-inf")
    assert (anything.status, "margin" in anything.err) == (2, True)
    assert call("promote", f"fresh/{WORSE}").status == 0
    policy = tmp_path / "promotion.yaml"
    policy.write_text("ceilings: {latency_p95_ms: 1.0e-9}\n")
    slow = call("promote", f"fresh/{BETTER}", "--policy", policy, "--dry-run")
    assert (slow.status, "not known" in slow.out) == (1, False), "it is measured"
    policy.write_text(
        "floors: {accuracy: 0.5, robustness: 0.1}\nceilings: {latency_p95_ms: 10000}\n"
        "largest_losses: {classes: 0.2, size: 0.5}\n"
    )
    done = call("promote", f"fresh/{BETTER}", "--policy", policy, "--json")
    verdict = json.loads(done.out)
    assert (done.status, verdict["passed"], verdict["champion"]) == (0, True, WORSE), done.out
    assert [rule["name"] for rule in verdict["rules"]] == [
        "floor of accuracy",
        "floor of robustness",
        "ceiling of latency_p95_ms",
        "leakage",
        "gain in accuracy",
        "McNemar's test",
        "largest significant loss of recall in a class",
        "largest significant loss of precision in a class",
        "size",
    ]
    registry = services.open_registry(Context.from_environment())
    version = registry.version("fresh", "champion")
    assert version.number == BETTER
    run = registry._client.get_run(version.tags[tag_names.DECISION])
    assert run.info.status == "FINISHED"
    assert run.data.tags["tessera.promotion.outcome"] == "promoted"
    root = Path(run.info.artifact_uri.removeprefix("file://"))
    assert json.loads((root / "verdict.json").read_text()) == verdict
    assert json.loads((root / "policy.json").read_text())["floors"]["accuracy"] == 0.5
    report = json.loads((root / "report" / "report.json").read_text())
    assert [one["model"] for one in report["models"]] == ["models:/fresh/2", "models:/fresh/1"]
    assert (root / "report" / "report.html").stat().st_size > 10_000

    again = call("promote", f"fresh/{BETTER}")
    assert (again.status, "is already the champion" in again.out) == (0, True)
    worse = call("promote", f"fresh/{WORSE}")
    assert worse.status == 1
    assert "FAIL  gain in accuracy" in worse.out
    assert champion(call, "fresh") == BETTER
    run_id = (
        services.open_registry(Context.from_environment())
        .version("fresh", WORSE)
        .tags[tag_names.DECISION]
    )
    refused = registry._client.get_run(run_id)
    assert refused.data.tags["tessera.promotion.outcome"] == "refused"


def test_promote_and_roll_back_repeatedly(home: Path, call: Call) -> None:
    back = call("rollback", "digits")
    assert (back.status, champion(call)) == (0, WORSE)
    assert call("rollback", f"digits/{BETTER}").status == 0
    assert champion(call) == BETTER
    never = call("rollback", "digits/99")
    assert (never.status, "no version" in never.err) == (1, True)
    kept = call("registry", f"digits/{BETTER}", "--delete")
    assert (kept.status, "is the champion and can't be deleted" in kept.err) == (1, True)
    assert champion(call) == BETTER


def test_a_promoted_version_is_copied_into_another_model(
    home: Path, call: Call, tmp_path: Path
) -> None:
    not_yet = call("promote", f"digits/{WORSE}", "--to-name", "production")
    assert (not_yet.status, "is not its champion" in not_yet.err) == (1, True)
    copied = ("promote", f"digits/{BETTER}", "--to-name", "production")
    assert call(*copied).status == 0
    assert champion(call, "production") == 1
    registry = services.open_registry(Context.from_environment())
    made, source = registry.version("production", 1), registry.version("digits", BETTER)
    assert made.tags["tessera.digest"] == source.tags["tessera.digest"]
    assert made.tags["tessera.copied_from"] == f"models:/digits/{BETTER}"
    assert call(*copied).status == 0, "once more"
    assert len(registry.versions("production")) == 1

    other = tmp_path / "other"
    mlflow_store.prepare(other)
    uri = mlflow_store.embedded_uri(other)
    assert call("promote", f"digits/{BETTER}", "--to-registry", uri).status == 0
    there = MlflowRegistry(uri).version("digits", "champion")
    assert there.tags["tessera.digest"] == source.tags["tessera.digest"]


def image_folder(root: Path, parts: dict[str, list[int]]) -> Path:
    """Writes digits of scikit-learn as PNG files by class; `parts` has their numbers by split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for split, numbers in parts.items():
        for number in numbers:
            folder = root / split / str(data.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (data.images[number] * 15.9375).round().astype("uint8")
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_a_candidate_trained_on_the_test_images_is_refused(
    home: Path, digits: Path, call: Call, tmp_path: Path
) -> None:
    """Its data set has the test images of the other as train split: another digest, other files."""
    test = [int(key) for key in keys(digits, "test")]
    rest = [int(key) for key in keys(digits, "val")]
    source = image_folder(tmp_path / "raw", {"train": test, "val": rest[:90], "test": rest[90:]})
    pack.pack(str(source), tmp_path / "leaky")
    number = fit(tmp_path / "leaky", 8, on=digits)
    done = call("promote", f"digits/{number}", "--json")
    verdict = json.loads(done.out)
    assert (done.status, verdict["passed"]) == (1, False)
    failed = {rule["name"]: rule["candidate"] for rule in verdict["rules"] if not rule["passed"]}
    assert failed["leakage"].startswith(f"{len(test)} of {len(test)} test images"), failed
    assert champion(call) == BETTER
    # As where the training data can't be looked at any more.
    shutil.rmtree(tmp_path / "leaky")
    gone = json.loads(call("promote", f"digits/{number}", "--json").out)
    assert "leakage" in {rule["name"] for rule in gone["rules"] if not rule["passed"]}
    # The tag says that it was trained on the test's own data set: the gate reads the files.
    registry = services.open_registry(Context.from_environment())
    own = registry.version("digits", BETTER).tags["tessera.data_digest"]
    registry.tag(registry.version("digits", number), {"tessera.data_digest": own})
    forged = json.loads(call("promote", f"digits/{number}", "--json").out)
    assert "leakage" in {rule["name"] for rule in forged["rules"] if not rule["passed"]}


def keys(data: Path, split: str) -> list[str]:
    from pipelines.data import card as cards
    from pipelines.data.shards import ShardReader

    reader = ShardReader(data, cards.read(data), split)
    return [reader.read(number).key for number in range(len(reader))]


def test_a_worse_candidate_that_was_lucky_on_a_few_images_is_refused(
    home: Path, digits: Path, call: Call, tmp_path: Path
) -> None:
    """The images are chosen so that the worse candidate is right on all of them."""
    rights = [right_on(home, version, digits) for version in (WORSE, BETTER)]
    lucky = [key for key in rights[0] if rights[0][key] and not rights[1][key]][:3]
    both = [key for key in rights[0] if rights[0][key] and rights[1][key]][:17]
    assert len(lucky) >= 1
    assert sum(rights[1].values()) > sum(rights[0].values())
    chosen = [int(key) for key in (*lucky, *both)]
    rest = [int(key) for key in (*keys(digits, "train")[:300], *keys(digits, "val"))]
    source = image_folder(
        tmp_path / "raw", {"train": rest[:300], "val": rest[300:], "test": chosen}
    )
    pack.pack(str(source), tmp_path / "small")
    evaluate.evaluate(f"digits/{WORSE}", data=tmp_path / "small", report=False, intervals=False)
    done = call("promote", f"digits/{WORSE}", "--json")
    verdict = json.loads(done.out)
    assert (done.status, verdict["passed"]) == (1, False)
    failed = [rule["name"] for rule in verdict["rules"] if not rule["passed"]]
    assert "McNemar's test" in failed or "gain in accuracy" in failed
    lead = next(rule for rule in verdict["rules"] if rule["name"] == "gain in accuracy")
    value = float(lead["candidate"].split()[0])
    assert value == 1.0, "by this metric alone it is the better one"
    evaluate.evaluate(f"digits/{WORSE}", data=digits, report=False, intervals=False)


def right_on(home: Path, version: int, data: Path) -> dict[str, bool]:
    """Key -> whether the prediction of the version is right, on the test split."""
    from pipelines.training import evaluator

    registry = services.open_registry(Context.from_environment())
    digest = registry.version("digits", version).tags["tessera.digest"]
    folder = home / f"version-{version}" / f"digits-{version}"
    model = loaded_model.load_model(folder, digest, str(data), World())
    predictions = evaluator.predict_split(
        model.family, model.evaluator, model.data, model.loader("test", World()), World()
    )
    assert predictions is not None
    return {
        key: record["predicted"] == record["label"]
        for key, record in zip(predictions.keys, predictions.records)
    }


class Payload:
    """A pickle with code that runs when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.fault(45, 46)
@pytest.mark.control(45, 46)
def test_tampered_files_are_refused_and_their_code_does_not_run(
    home: Path, digits: Path, call: Call, tmp_path: Path
) -> None:
    number = register_copy(home, WORSE)
    registry = services.open_registry(Context.from_environment())
    uri = registry._client.get_model_version_download_uri("digits", str(number))
    files, marker = Path(uri.removeprefix("file://")), tmp_path / "marker"
    whole = tmp_path / "whole"
    shutil.copytree(files, whole)
    kinds = {
        "weights.safetensors": pickle.dumps(Payload(marker)),
        "data/model.pt2": pickle.dumps(Payload(marker)),
        "MLmodel": b"flavors: {python_function: {loader_module: evil, code: code}}\n",
        "manifest.json": b"{}",
    }
    for name, content in kinds.items():
        assert (files / name).exists()
        (files / name).write_bytes(content)
        (files / "code").mkdir()
        (files / "code" / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})")
        for verb in (
            ("promote", f"digits/{number}"),
            ("evaluate", f"digits/{number}", "--data", digits),
            ("predict", f"digits/{number}", tmp_path),
            ("export", f"digits/{number}", "--format", "pt2", "--out", tmp_path / "out.pt2"),
        ):
            done = call(*verb)
            assert done.status == 1, (name, verb)
            output = done.out + done.err
            assert "checksum differs" in output or "no readable manifest" in output, (name, output)
        shutil.rmtree(files)
        shutil.copytree(whole, files)
    run = home / "runs" / registry.version("digits", number).tags["tessera.run"]
    for path in run.glob("checkpoints/step-*/*.safetensors"):
        path.write_bytes(kinds["weights.safetensors"])
    call("train", "--resume", run.name, "--workers", 0)
    assert not marker.exists()
    pickle.loads(kinds["weights.safetensors"])
    assert marker.exists(), "the control: loaded as a pickle it runs"
    assert champion(call) == BETTER


@pytest.mark.fault(48)
def test_a_deleted_run_and_a_foreign_source_are_refused(
    home: Path, digits: Path, call: Call, tmp_path: Path
) -> None:
    number = register_copy(home, WORSE)
    registry = services.open_registry(Context.from_environment())
    version = registry.version("digits", number)
    files = registry.download(version, tmp_path)
    registry._client.delete_run(version.run_id)
    done = call("promote", f"digits/{number}")
    registry._client.restore_run(version.run_id)
    assert (done.status, "its run was deleted" in done.out) == (1, True)
    # A version of the same tags and files, that somebody put next to the store.
    made = registry._client.create_model_version(
        "digits", source=f"file://{files}", run_id=version.run_id, tags=dict(version.tags)
    )
    done = call("promote", f"digits/{made.version}")
    assert (done.status, "outside of its run's experiment" in done.out) == (1, True)


@pytest.mark.fault(48)
def test_versions_not_evaluated_or_evaluated_on_other_data_are_refused(
    home: Path, digits: Path, call: Call, tmp_path: Path
) -> None:
    number = register_copy(home, WORSE, without=f"{tag_names.EVALUATION_PREFIX}test")
    done = call("promote", f"digits/{number}")
    assert (done.status, "was not evaluated" in done.out) == (1, True)
    evaluate.evaluate(f"digits/{number}", data=digits, report=False, intervals=False)
    pack.pack("digits", tmp_path / "other", seed=3)
    done = call("promote", f"digits/{number}", "--data", tmp_path / "other")
    assert (done.status, "evaluated on other data" in done.out) == (1, True)


def test_a_report_compares_two_models(home: Path, digits: Path, call: Call, tmp_path: Path) -> None:
    fields = tmp_path / "fields.csv"
    with fields.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "writer"])
        rows.writerows(
            [key, "left" if n % 2 else "right"] for n, key in enumerate(keys(digits, "test"))
        )
    folder = tmp_path / "report"
    words = ("--data", digits, "--report", folder, "--fields", fields, "--robustness", 20)
    done = call("evaluate", "digits/2", "digits/1", *words)
    assert done.status == 0, done.err
    assert "gain over models:/digits/1" in done.out
    assert f"report {folder / 'report.html'}" in done.out
    found = json.loads((folder / "report.json").read_text())
    assert {part["by"] for part in found["models"][0]["slices"]} == {"brightness", "writer"}
    twice = call("evaluate", "digits/2", "--data", digits, "--report", folder)
    assert (twice.status, "already exists" in twice.err) == (2, True)
    same = call("evaluate", "digits/2", "digits/2", "--data", digits, "--no-report")
    assert (same.status, "named twice" in same.err) == (2, True)
    run_id = services.open_registry(Context.from_environment()).version("digits", 2).run_id
    names = {
        item.path
        for item in services.open_registry(Context.from_environment())._client.list_artifacts(
            run_id, "evaluation/test"
        )
    }
    assert "evaluation/test/report.html" in names


def test_the_result_does_not_depend_on_the_number_of_workers(home: Path, digits: Path) -> None:
    registry = services.open_registry(Context.from_environment())
    version = registry.version("digits", 2)
    folder = registry.download(version, home / "same")
    payload = {
        "model": str(folder),
        "digest": version.tags["tessera.digest"],
        "data": str(digits),
        "split": "test",
    }
    noted = gate.evaluation_of(version)
    assert noted is not None
    found = rank_work.evaluate(World(), payload)["metrics"]
    assert {name: found[name] for name in noted.metrics} == noted.metrics
