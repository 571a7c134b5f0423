"""The documentation as a site and as a notebook."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import models

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_with_every_verb_and_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make docs` is strict: a broken link, or a page outside the navigation, fails it."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    from jobs.cli import verbs

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    command = (tmp_path / "reference" / "command.html").read_text()
    assert [verb for verb in verbs() if f'<h2 id="tessera-{verb}"' not in command] == []
    settings = (tmp_path / "reference" / "settings.html").read_text()
    paths = {"train.batch_size", "data.fit", "schedule.kind", "workers.count", "model.dropout"}
    assert [path for path in paths if f"<code>{path}</code>" not in settings] == []
    assert [name for name in models.names() if f">{name}<" not in settings] == []
    assert "<td></td>" not in settings, "a setting without a meaning"


@pytest.mark.slow
def test_a_broken_link_fails_the_site(tmp_path: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[nowhere](nowhere.md)\n")
    config = load_config(
        str(ROOT / "mkdocs.yml"),
        docs_dir=str(tmp_path / "docs"),
        site_dir=str(tmp_path / "site"),
        nav=[],
        hooks=[],
    )
    with pytest.raises(Abort):
        build(config)


@pytest.mark.e2e
@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "first-steps.ipynb", as_version=4)
    assert len(notebook.cells) == 10
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    text = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert re.search(r"^\d [01]\.\d+$", text, re.MULTILINE), text
