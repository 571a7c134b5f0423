"""Errors about unknown names suggest the nearest known one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback

import pytest

import tessera
from models.core.errors import TesseraError, UsageError, hide_passwords, nearest, unknown

SETTINGS = [
    "optim.model.lr",
    "optim.model.weight_decay",
    "train.epochs",
    "train.batch_size",
    "data.height",
    "model.depth",
]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("optim.model.lrr", "optim.model.lr"),
        ("lr", "optim.model.lr"),
        ("LR", "optim.model.lr"),
        ("epochs", "train.epochs"),
        ("epoch", "train.epochs"),
        ("batch-size", "train.batch_size"),
        ("model.lr", "optim.model.lr"),
        ("weigth_decay", "optim.model.weight_decay"),
        ("data.heigth", "data.height"),
        ("flavour", None),
    ],
)
def test_the_nearest_path_is_suggested_at_any_depth(given: str, expected: str | None) -> None:
    assert nearest(given, SETTINGS) == expected


def test_the_hint_lists_the_names_or_how_to_list_them() -> None:
    assert unknown("fruit", "aple", ["apple", "pear"]).hint == (
        "did you mean 'apple'? Known: apple, pear"
    )
    assert unknown("fruit", "xyz", ["apple", "pear"]).hint == "known: apple, pear"
    assert unknown("fruit", "aple", ["apple"], see="shop list").hint == (
        "did you mean 'apple'? See: shop list"
    )
    many = [f"name{number:02d}" for number in range(20)]
    assert unknown("name", "xyz", many).hint.endswith("name11, …")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:hunter2@host:5000/a@2.png", "https://host:5000/a@2.png"),
        ("postgresql+psycopg2://u:hunter2@ss@db/x failed", "postgresql+psycopg2://db/x failed"),
        ("s3://key:hunter2@bucket", "s3://bucket"),
        ("https://h/x?X-Amz-Signature=hunter2&a=1", "https://h/x?X-Amz-Signature=…&a=1"),
        ("MLFLOW_TRACKING_PASSWORD=hunter2 is wrong", "MLFLOW_TRACKING_PASSWORD=… is wrong"),
        ("two: ftp://a:hunter2@b and ftp://c:hunter2@d", "two: ftp://b and ftp://d"),
        # and what looks similar
        ("models:/photos@champion", "models:/photos@champion"),
        ("optim.model.lr=0.1 model.class_token=true", "optim.model.lr=0.1 model.class_token=true"),
        ("s3://bucket/folder/a@b:c", "s3://bucket/folder/a@b:c"),
        ("mail me@example.com", "mail me@example.com"),
    ],
)
def test_passwords_are_hidden(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown
    error = TesseraError(text, hint=text)
    assert (error.message, error.hint) == (shown, shown)
    assert "hunter2" not in str(pickle.loads(pickle.dumps(error)))


@pytest.mark.parametrize("kind", [TesseraError, UsageError])
def test_a_traceback_names_the_class_that_users_import(kind: type[TesseraError]) -> None:
    error = kind("what is wrong", hint="what to do")
    (line,) = traceback.format_exception_only(error)
    assert line == f"tessera.{kind.__name__}: what is wrong. what to do\n"
    assert getattr(tessera, kind.__name__) is kind


def test_the_class_is_pickled_by_name() -> None:
    """A copy of it on the other side would not be caught as a TesseraError. This process may have
    loaded `tessera` for another reason, so a new one does it."""
    code = (
        "import cloudpickle, pickle, pickletools\n"
        "from models.core.errors import UsageError\n"
        "data = cloudpickle.dumps(UsageError('a', hint='b'))\n"
        "assert type(pickle.loads(data)) is UsageError\n"
        "print(b'_make_skeleton_class' in data or b'exit_code' in data)\n"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
