"""The command line as a user sees it: help without delay, and errors as one line with a hint."""

from __future__ import annotations

import importlib
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from cli_runner import Call, Done
from PIL import Image

from jobs.cli import GROUPS, SYNONYMS, listed, run, tessera, verbs

ROOT = Path(__file__).parents[2]
HELP_CPU_SECONDS = 0.5
HEAVY = (
    "torch",
    "ray",
    "mlflow",
    "webdataset",
    "torchvision",
    "matplotlib",
    "sklearn",
    "onnx",
    "onnxruntime",
)

_CALL_AND_TELL = f"""
import sys
from jobs.cli import main
sys.argv[0] = "tessera"
try:
    main()
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `tessera ARGUMENTS` in a new process; the last line of stderr lists the loaded
    modules."""
    return subprocess.run(
        [sys.executable, "-c", _CALL_AND_TELL, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ── help ──────────────────────────────────────────────────────────────────────────────────────


def help_of(verb: str) -> str:
    name = f"tessera {verb}".rstrip()
    command = tessera.get_command(click.Context(tessera), verb) if verb else tessera
    assert command is not None
    with click.Context(command, info_name=name) as context:
        return command.get_help(context)


@pytest.mark.parametrize("words", [[], ["train"]])
def test_help_takes_a_fraction_of_a_second(words: list[str]) -> None:
    seconds: list[float] = []
    while len(seconds) < 3 and min(seconds, default=1.0) >= HELP_CPU_SECONDS:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = start(*words, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert shown.returncode == 0
        assert shown.stdout.startswith(" ".join(["Usage: tessera", *words]))
        assert shown.stderr.strip() == "[]"
    assert min(seconds) < HELP_CPU_SECONDS


def test_importing_the_verbs_loads_nothing_heavy() -> None:
    modules = ", ".join(f"jobs.{verb}" for verb in verbs())
    code = f"import sys, {modules}\nprint([n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_help_lists_every_verb_once_in_groups_with_an_untruncated_line() -> None:
    text = help_of("")
    assert max(map(len, text.splitlines())) <= 80
    seen = []
    for heading in GROUPS.values():
        block = text.partition(f"\n{heading}:\n")[2].partition("\n\n")[0]
        for line in block.splitlines():
            verb, _, about = line.strip().partition(" ")
            assert about.strip() == listed(verb)[1]
            assert about.endswith("."), line
            seen.append(verb)
    assert sorted(seen) == verbs()
    assert "More:" not in text


def test_the_listed_line_is_the_first_of_the_command_s_help() -> None:
    for verb in verbs():
        command = tessera.get_command(click.Context(tessera), verb)
        assert command is not None
        assert (command.short_help, importlib.import_module(f"jobs.{verb}").GROUP) == (
            listed(verb)[1],
            listed(verb)[0],
        )


def test_every_option_of_every_verb_has_a_sentence_of_help() -> None:
    wrong = []
    for verb in verbs():
        command = tessera.get_command(click.Context(tessera), verb)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                text = option.help or ""
                if not (text.endswith(".") and text[0].isupper()):
                    wrong.append(f"{verb} {option.opts[0]}: {text!r}")
        wrong += [f"{verb}: {line}" for line in help_of(verb).splitlines() if len(line) > 80]
        wrong += [
            f"{verb}: {line}"
            for line in help_of(verb).splitlines()
            if line.endswith("...") and "Usage" not in line
        ]
    assert wrong == []


def test_a_verb_can_be_run_as_a_module() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "jobs.formats", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("Usage: tessera formats ")


def test_every_module_of_jobs_except_the_cli_is_a_verb() -> None:
    modules = {p.stem for p in (ROOT / "jobs").glob("*.py")} - {"__init__", "cli"}
    has_command = {v for v in modules if hasattr(importlib.import_module(f"jobs.{v}"), "command")}
    assert has_command == modules == set(verbs())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *((word, "evaluate") for word in ("test", "val", "validate")),
        *((word, "predict") for word in ("infer", "run")),
        *((word, "registry") for word in ("ls", "list", "models")),
        *((word, "doctor") for word in ("check", "checks")),
        *((word, "tune") for word in ("sweep", "hpo", "search")),
        *((word, "pack") for word in ("import", "convert")),
        ("delete", "registry MODEL/VERSION --delete"),
        ("resume", "train --resume RUN"),
        ("help", "--help"),
    ],
)
def test_a_synonym_of_a_verb_suggests_the_verb(typed: str, meant: str, call: Call) -> None:
    said(call(typed), 2, f"unknown verb {typed!r}", f"did you mean: tessera {meant}?")


def test_synonyms_are_unique_and_point_to_existing_verbs() -> None:
    words = " ".join(SYNONYMS.values()).split()
    assert len(words) == len(set(words))
    assert not set(words) & set(verbs())
    assert {instead.split()[0] for instead in SYNONYMS} - {"--help", "--version"} <= set(verbs())


def test_a_dry_run_loads_no_service(digits: Path) -> None:
    shown = start("train", "cnn", "--data", str(digits), "--workers", "0", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("family: cnn\n")
    assert "1,439 training images of 1 x 8 x 8" in shown.stdout
    assert shown.stderr.strip() == "['torch']"


def test_shortcuts_set_the_common_settings(call: Call, digits: Path) -> None:
    words = "--epochs 3 --batch-size 32 --lr 1e-2 --image-size 16 --set train.epochs=4"
    done = call("train", "cnn", "--data", digits, "--dry-run", "--json", *words.split())
    recipe = json.loads(done.out)["recipe"]
    assert (recipe["train"]["epochs"], recipe["train"]["batch_size"]) == (4, 32)
    assert (recipe["data"]["height"], recipe["data"]["width"]) == (16, 16)
    assert recipe["optim"]["model"]["lr"] == 0.01


def test_version(call: Call) -> None:
    import importlib.metadata

    assert (
        call("--version").out == f"tessera, version {importlib.metadata.version('tessera-train')}\n"
    )


@pytest.mark.parametrize(
    ("shell", "says"),
    [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --no-files")],
)
def test_completion(shell: str, says: str) -> None:
    script = start(_TESSERA_COMPLETE=f"{shell}_source")
    assert script.returncode == 0
    assert says in script.stdout
    words = {"COMP_WORDS": "tessera pro", "COMP_CWORD": "1"}
    if shell == "bash":
        completed = start(_TESSERA_COMPLETE="bash_complete", **words)
        assert completed.stdout == "plain,promote\n"
        assert completed.stderr.strip() == "[]"


def test_families(call: Call) -> None:
    rows = json.loads(call("families", "--json").out)
    assert {"cnn", "resnet"} <= {row["family"] for row in rows}
    assert all({"tiny", "base"} <= set(row["variants"]) and row["about"] for row in rows)
    listed = call("families").out
    assert all(row["family"] in listed and row["about"] in listed for row in rows)


def test_formats(call: Call) -> None:
    rows = json.loads(call("formats", "--json").out)
    assert {"image_folder", "coco", "torchvision"} <= {row["format"] for row in rows}
    listed = call("formats").out
    for row in rows:
        assert row["about"] in listed
        assert all(f"--option {name}=" in listed for name in row["options"])


# ── mistakes ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def home(trained_home: Path) -> Path:
    """A home with one small registered model: `digits`, version 1, `challenger`."""
    return trained_home


def said(done: Done, status: int, *parts: str) -> None:
    """An error is one line that describes the problem, and at most one more with a hint."""
    assert done.status == status, done
    assert not done.out
    lines = done.err.splitlines()
    assert 1 <= len(lines) <= 2, done.err
    assert lines[0].startswith("tessera: ")
    for part in parts:
        assert part in done.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("trian", ["unknown verb 'trian'", "did you mean 'train'"]),
        ("--verison", ["No such option '--verison'", "--version"]),
        ("train --wrokers 1", ["No such option '--wrokers'", "--workers"]),
        ("train", ["nothing to train", "tessera families"]),
        ("train cnn", ["no data set", "--data DIR"]),
        ("train cnnn --data DIGITS", ["unknown family or recipe 'cnnn'", "did you mean 'cnn'"]),
        ("train cnn --variant tony --data DIGITS", ["unknown variant", "did you mean 'tiny'"]),
        ("train cnn resnet --data DIGITS", ["unexpected extra argument (resnet)"]),
        ("train cnn --data DIGITS --set optim.model.lt=1", ["did you mean 'optim.model.lr'"]),
        ("train cnn --data DIGITS --set model.chanels=1", ["did you mean 'model.channels'"]),
        ("train cnn --data DIGITS --set lr=1", ["unknown setting 'lr'", "mean 'optim.model.lr'"]),
        ("train cnn --data DIGITS --set batchsize=1", ["did you mean 'train.batch_size'"]),
        ("train cnn --data DIGITS --set weigth_decay=1", ["mean 'optim.model.weight_decay'"]),
        ("train cnn --data DIGITS --epochs 0", ["0 is not in the range x>=1"]),
        ("tune cnn --data DIGITS --search bayes", ["'bayes' is not one of", "'optuna'"]),
        ("tune cnn --data DIGITS --scheduler median", ["'median' is not one of"]),
        ("train cnn --data DIGITS --set optim.model.lr=fast", ["'fast'", "valid number"]),
        ("train cnn --data DIGITS --set train.epochs=1.5", ["train.epochs", "integer"]),
        ("train cnn --data DIGITS --set train.epochs=0", ["train.epochs = 0", "greater than"]),
        ("train cnn --data DIGITS --set model.kernel=2", ["model.kernel = 2", "odd"]),
        ("train cnn --data DIGITS --set lr", ["--set lr has no value", "PATH=VALUE"]),
        ("train cnn --data DIGITS --workers -1", ["workers.count = -1", "0"]),
        ("train cnn --data DIGITS --workers two", ["'two' is not a valid integer"]),
        ("train cnn --data DIGITS --model a/b", ["'a/b' is not a valid name of a model"]),
        ("train none.yaml --data DIGITS", ["none.yaml can't be read"]),
        ("train SCRATCH/typo.yaml --data DIGITS", ["'optin'", "did you mean 'optim'"]),
        ("train SCRATCH/deep.yaml --data DIGITS", ["'train.epoch'", "did you mean 'train.epochs'"]),
        ("train SCRATCH/no.yaml --data DIGITS", ["is not valid YAML"]),
        ("train SCRATCH/empty.yaml --data DIGITS", ["begin with: family: cnn"]),
        ("train cnn --resume x --data DIGITS", ["--resume takes the recipe of the run"]),
        ("train --resume nobody", ["unknown run 'nobody'", "known: cnn-digits-"]),
        ("evaluate digits --data DIGITS --split tset", ["'tset' is not one of"]),
        ("evaluate digits", ["Missing option '--data'"]),
        ("evaluate dogits --data DIGITS", ["unknown model 'dogits'", "did you mean 'digits'"]),
        ("rollback digits/one", ["'digits/one' does not name a model", "NAME@alias"]),
        ("registry digits --delete", ["--delete needs a version", "registry digits/1 --delete"]),
        ("promote dogits/1", ["unknown model 'dogits'", "did you mean 'digits'"]),
        ("predict models:/dogits@champion x.png", ["unknown model", "did you mean 'digits'"]),
        ("predict digits", ["nothing to predict", "--samples N"]),
    ],
)
def test_usage_errors_have_a_hint(
    words: str, parts: list[str], call: Call, home: Path, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "typo.yaml").write_text("family: cnn\noptin: {}\n")
    (tmp_path / "deep.yaml").write_text("family: cnn\ntrain: {epoch: 3}\n")
    (tmp_path / "no.yaml").write_text("family: [cnn\n")
    (tmp_path / "empty.yaml").write_text("")
    before = set((home / "runs").iterdir())
    line = words.replace("DIGITS", str(digits)).replace("SCRATCH", str(tmp_path))
    said(call(*line.split()), 2, *parts)
    assert set((home / "runs").iterdir()) == before


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("train cnn --data SCRATCH", ["is not a packed data set", "tessera pack SOURCE --to"]),
        ("train cnn --data SCRATCH/none", ["is not a packed data set", "tessera pack SOURCE --to"]),
        ("inspect SCRATCH", ["is not a packed data set", "tessera pack SOURCE --to"]),
        ("evaluate digits --data SCRATCH", ["is not a packed data set"]),
        ("evaluate digits@champion --data DIGITS", ["'champion'", "aliases challenger"]),
        ("evaluate digits/7 --data DIGITS", ["'7'", "it has version 1"]),
        ("promote digits/7", ["'7'", "it has version 1"]),
        ("rollback dogits", ["has no champion"]),
        ("rollback digits", ["has no champion"]),
        ("predict models:/digits@champion x.png", ["'champion'", "aliases challenger"]),
        ("predict models:/digits/7 x.png", ["'7'", "it has version 1"]),
    ],
)
def test_errors_about_unknown_names_list_the_known_ones(
    words: str, parts: list[str], call: Call, home: Path, digits: Path, tmp_path: Path
) -> None:
    line = words.replace("DIGITS", str(digits)).replace("SCRATCH", str(tmp_path))
    said(call(*line.split()), 1, *parts)


def test_a_version_without_evaluation_is_refused(call: Call, home: Path) -> None:
    done = call("promote", "digits/1")
    assert done.status == 1
    assert "version 1 of digits refused: " in done.out
    assert "tessera evaluate" in done.out
    assert "no version or alias 'champion'" in call("predict", "digits@champion", "x").err


@pytest.mark.parametrize(
    "words",
    [
        "train cnn --workers 0 --data DIGITS",
        "evaluate digits --data DIGITS",
        "promote digits/1",
        "rollback digits",
        "predict models:/digits@challenger x.png",
    ],
)
def test_an_unreachable_mlflow_is_reported_at_once(
    words: str, call: Call, home: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:  # bound, so that nobody else listens there
        held.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        before = set((home / "runs").iterdir())
        done = call(*words.replace("DIGITS", str(digits)).split())
    said(done, 1, address, "refused", "tessera up", "MLFLOW_TRACKING_URI")
    assert set((home / "runs").iterdir()) == before, "a training that never began left its folder"


def test_verbose_shows_the_traceback(call: Call) -> None:
    from models.core.errors import UsageError

    with pytest.raises(UsageError, match="unknown family"):
        run(tessera, "tessera", ["train", "cnnn", "--verbose"])


def test_an_unwritable_output_is_reported(call: Call, home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    out = tmp_path / "file" / "answers.jsonl"
    said(call("predict", "digits@challenger", tmp_path / "a.png", "--out", out), 1, str(out.parent))


def test_an_unreadable_input_has_a_line_of_its_own(call: Call, home: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(good)
    bad.write_bytes(good.read_bytes()[:40])
    inputs = [good, bad, tmp_path / "none.png"]
    for strict, status in ([], 0), (["--strict"], 1):
        done = call("predict", "digits@challenger", *inputs, *strict)
        assert done.status == status
        answers = [json.loads(line) for line in done.out.splitlines()]
        assert [answer["path"] for answer in answers] == [str(path) for path in inputs]
        assert [set(answer) >= {"class", "probability"} for answer in answers] == [
            True,
            False,
            False,
        ]
        assert all("error" in answer for answer in answers[1:])
        assert all((a["model"], a["version"]) == ("digits", 1) for a in answers)
        assert done.err == "2 of 3 inputs couldn't be read; each line says why\n"
    assert call("predict", "digits@challenger", good, "--strict").status == 0
    assert call("predict", "digits@challenger", good.with_name("nothing.png")).status == 1


def test_predictions_are_written_completely_or_not_at_all(
    call: Call, home: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    out = tmp_path / "deep" / "answers.jsonl"
    folder = tmp_path / "annotated"
    arguments = ("predict", "digits@challenger", tmp_path / "a.png", "--out", out)
    assert call(*arguments, "--annotated", folder).status == 0
    assert [json.loads(line)["version"] for line in out.read_text().splitlines()] == [1]
    assert [path.name for path in folder.iterdir()] == ["a.png"]
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]


def test_a_closed_pipe_is_not_an_error(home: Path) -> None:
    shown = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m jobs.families --json | head -c 1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shown.stdout, shown.stderr) == ("[", "")


WITH_RAY = """
import sys
import click, ray
from jobs.cli import run
from models.core.errors import UsageError

@click.command()
def command():
    print("said", end="")
    {how}

run(command, "x")
"""


@pytest.mark.parametrize(
    ("how", "status"),
    [("return 0", 0), ("return 3", 3), ("raise UsageError('no')", 2), ("1 / 0", 1)],
)
def test_a_process_that_loaded_ray_returns_its_exit_status(how: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITH_RAY.format(how=how)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (status, "said")
