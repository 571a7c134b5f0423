"""The command line as a user sees it: help without delay, completion, the exit status."""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_runner import Call

from jobs.cli import GROUPS, SYNONYMS, listed, tessera, verbs

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


def test_synonyms_are_unique_and_point_to_existing_verbs() -> None:
    words = " ".join(SYNONYMS.values()).split()
    assert len(words) == len(set(words))
    assert not set(words) & set(verbs())
    assert {instead.split()[0] for instead in SYNONYMS} - {"--help", "--version"} <= set(verbs())


@pytest.mark.slow
def test_a_dry_run_loads_no_service(digits: Path) -> None:
    shown = start("train", "cnn", "--data", str(digits), "--workers", "0", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("family: cnn\n")
    assert "1,439 training images of 1 x 8 x 8" in shown.stdout
    assert shown.stderr.strip() == "['torch']"
    refused = start("train", "cnn")
    assert "no data set" in refused.stderr
    assert refused.stderr.splitlines()[-1] == "[]", "it is refused before anything is loaded"


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


# ── exit status ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_closed_pipe_is_not_an_error() -> None:
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
    print("result", end="")
    {how}

run(command, "x")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status"),
    [("return 0", 0), ("return 3", 3), ("raise UsageError('no')", 2), ("1 / 0", 1)],
)
def test_a_process_that_loaded_ray_returns_its_exit_status(how: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITH_RAY.format(how=how)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (status, "result")
