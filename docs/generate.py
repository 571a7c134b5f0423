"""A MkDocs hook: writes the reference pages that are generated from the code.

In: the command's click objects, and the descriptions of the families. Out: `reference/command.md`
and `reference/settings.md`, in memory only, so they are never out of date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FAMILY_SECTIONS = ("model", "augment", "optim")
"""Sections of a recipe whose settings depend on the family."""


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    sys.path.insert(0, str(ROOT))
    for path, text in (
        ("reference/command.md", command_page()),
        ("reference/settings.md", settings_page()),
    ):
        files.append(File.generated(config, path, content=text))
    return files


def command_page() -> str:
    """Every verb with its help and its options, as `--help` prints them."""
    import click

    from jobs.cli import EXIT_STATUSES, tessera

    context = click.Context(tessera, info_name="tessera")
    lines = ["# Command", "", "The help of every verb. `tessera VERB --help` prints the same.", ""]
    lines += ["## Exit status", "", "| status | meaning |", "|---|---|"]
    lines += [f"| {status} | {meaning} |" for status, meaning in EXIT_STATUSES.items()]
    lines += [
        "",
        "A process that a signal ended has 128 + the number of the signal.",
    ]
    lines += ["`tessera submit` returns the status of the verb that it ran on the cluster.", ""]
    for name in tessera.list_commands(context):
        command = tessera.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context, max_content_width=90)
        lines += [f"## tessera {name}", "", "```", command.get_help(inner), "```", ""]
    return "\n".join(lines)


def settings_page() -> str:
    """The settings that all families share, then those of each family."""
    import models
    from pipelines.workflows.describe import SECTIONS, describe

    families = [describe(name) for name in models.names()]
    lines = [
        "# Settings",
        "",
        "Every setting of a recipe, by its path for `--set`. `tessera describe FAMILY` prints the "
        "same for one family, with the defaults of a variant.",
        "",
    ]
    for section, title in SECTIONS.items():
        if section not in FAMILY_SECTIONS:
            shared = [s for s in families[0].settings if s.section == section]
            lines += [f"## {title}", "", *_table(shared), ""]
    for family in families:
        own = [s for s in family.settings if s.section in FAMILY_SECTIONS]
        variants = ", ".join(f"`{variant.name}`" for variant in family.variants)
        task = family.task.replace("_", " ")
        lines += [f"## {family.family}", "", family.about, ""]
        lines += [f"Task: {task}. Variants: {variants}.", "", *_table(own), ""]
    return "\n".join(lines)


def _table(settings: Iterable[Any]) -> list[str]:
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for setting in settings:
        kind = setting.type.replace("|", "\\|")
        default = json.dumps(setting.default)
        rows.append(f"| `{setting.path}` | {kind} | `{default}` | {setting.help} |")
    return rows
