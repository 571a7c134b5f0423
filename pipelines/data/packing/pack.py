"""From a raw source to a packed data set.

In: a folder of images, or the name of a bundled data set. Out: shards and a card, or one error and
nothing written. Must not know Ray or MLflow.

`formats.py` finds the importer, `plan.py` assigns samples to shards, `shard.py` makes one shard and
`run.py` all of them. Where the shards are made is up to the caller, by `map_tasks`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from models.core.errors import UsageError, unknown
from pipelines.data.card import FILE, SPLITS, Card
from pipelines.data.packing import formats, in_place
from pipelines.data.packing import plan as packing_plan
from pipelines.data.packing.formats import Format
from pipelines.data.packing.run import MapTasks, PackRun, Progress
from pipelines.data.packing.shard import PackSpec
from pipelines.data.packing.staging import refuse_occupied, stage
from pipelines.data.sources import Source


def pack(
    source: str,
    to: str | Path,
    *,
    format: str | None = None,
    options: Mapping[str, str] | None = None,
    name: str | None = None,
    licence: str = "",
    seed: int = 0,
    shard_samples: int | None = None,
    resize: int | None = None,
    quality: int | None = None,
    allow_rejected: str = "0",
    near: bool = True,
    unseen: Sequence[str] = (),
    map_tasks: MapTasks | None = None,
    map_tasks_from: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Card:
    """Packs `source` into `to`, a new folder or an address, and gives the card.

    `shard_samples` is the most that a shard has; by default as many as fit in 64 MiB. `resize` is
    the most pixels that the shorter side of an image keeps, `quality` that of the JPEGs made then.
    `allow_rejected` is how many samples may fail their check: a number, or a share like "0.5%".
    `near` says whether images of two splits that look alike are sought. `unseen` are classes, or
    lists of classes with commas, that only test is to have: their images are left out of train and
    val, and those of the other classes out of test. `map_tasks` is where shards are made, for sources
    of `map_tasks_from` items or more; else it is here.

    Raises TesseraError, and leaves nothing behind, for an occupied `to`, a source without images or
    an empty class. Where more samples are rejected than allowed, and after an interruption, what is
    done stays, and the same call goes on with it. The same input gives the same bytes.
    """
    _check_numbers(shard_samples, resize, quality)
    refuse_occupied(to)
    chosen = formats.choose(source, format, options or {})
    say(f"reading {source} as {chosen.name}: {chosen.why}")
    if not hasattr(chosen.importer, "read"):
        if shard_samples or resize or unseen:
            raise UsageError(
                f"{chosen.name} uses the shards in place, as they are",
                hint="leave --shard-samples, --resize and --unseen out",
            )
        return in_place.index(
            source,
            to,
            options=chosen.options,
            name=name,
            licence=licence,
            seed=seed,
            allow_rejected=allow_rejected,
            progress=progress,
            say=say,
        )
    with stage(to) as staged:
        found = _read(chosen, source, say)
        bare = replace(found, items=())
        spec = PackSpec(bare, staged.place.where, None, "", resize, quality)
        how = {
            "format": chosen.name,
            "options": chosen.options,
            "seed": seed,
            "resize": [resize, quality],
        }
        labels = _find_classes(found, unseen)
        if labels:
            how["unseen"] = sorted(labels)
        _tell_cut(found, say)
        plan = packing_plan.make_plan(
            found, spec, seed=seed, shard_samples=shard_samples, unseen=labels
        )
        spec = replace(spec, plan=packing_plan.digest(plan, found, how))
        afar = map_tasks if len(found.items) >= map_tasks_from else None
        note = _tell_unseen(found, plan, say)
        run = PackRun(staged, plan, spec, map_tasks=afar, progress=progress, say=say)
        run.pack(allow_rejected, near=near)
        source = f"{chosen.name}:{found.name}{note}"
        card = run.card(name=name or found.name, source=source, licence=licence)
        staged.place.write(FILE, card.to_json().encode())
    return card


def _tell_cut(source: Source, say: Callable[[str], None]) -> None:
    """What will be cut from train where the source has other splits: else it would seem its own."""
    given = {item.split or "train" for item in source.items}
    missing = [split for split in SPLITS if split not in given]
    if missing and len(given) > 1:
        share = f"a tenth of it{' for each' if len(missing) > 1 else ''}"
        say(f"the source has no {' and no '.join(missing)}: cut from train, {share}")


def _find_classes(source: Source, given: Sequence[str]) -> frozenset[int]:
    """The classes that are named, as labels. Raises UsageError for a name that there isn't."""
    if given and source.task != "classification":
        kind = source.task.replace("_", " ")
        raise UsageError(
            f"data of {kind} have no classes of whole images", hint="leave --unseen out"
        )
    labels = set()
    for text in given:
        names = [text] if text in source.classes else text.split(",")
        for name in filter(None, map(str.strip, names)):
            if name not in source.classes:
                raise unknown("class", name, source.classes)
            labels.add(source.classes.index(name))
    return frozenset(labels)


def _tell_unseen(source: Source, plan: packing_plan.PackPlan, say: Callable[[str], None]) -> str:
    """Says what is left out for the unseen classes; gives what the card says of them."""
    if not plan.unseen:
        return ""
    names = ", ".join(source.classes[label] for label in sorted(plan.unseen))
    say(
        f"only test has the classes {names}, and no other: {plan.left_out:,} images are left out "
        "for that"
    )
    return f", unseen: {names}"


def _read(chosen: Format, source: str, say: Callable[[str], None]) -> Source:
    # Workers may have another current folder.
    location = os.path.abspath(source) if os.path.exists(source) else source
    found = chosen.importer.read(location, chosen.options)
    for note in found.notes:
        say(note)
    return found


def _check_numbers(shard_samples: int | None, resize: int | None, quality: int | None) -> None:
    if shard_samples is not None and shard_samples < 1:
        raise UsageError(f"{shard_samples} samples a shard are too few", hint="give 1 or more")
    if resize is not None and resize < 1:
        raise UsageError(f"--resize {resize} leaves no pixels", hint="give 1 or more")
    if quality is not None and resize is None:
        raise UsageError(
            "--quality without --resize: images go in untouched", hint="give --resize N with it"
        )
    if quality is not None and not 1 <= quality <= 100:
        raise UsageError(f"--quality {quality} is none of JPEG", hint="give 1 to 100")
