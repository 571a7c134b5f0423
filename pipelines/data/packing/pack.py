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
from typing import Any

from models.core.errors import UsageError, unknown
from pipelines.data import image_reading
from pipelines.data.card import FILE, SPLITS, Card, Split
from pipelines.data.image_reading import reading_images
from pipelines.data.packing import account as account_file
from pipelines.data.packing import formats, image_checks, in_place
from pipelines.data.packing import plan as packing_plan
from pipelines.data.packing.account import account_for
from pipelines.data.packing.formats import Format
from pipelines.data.packing.run import MapTasks, PackRun, Progress
from pipelines.data.packing.shard import PackSpec
from pipelines.data.packing.staging import refuse_occupied, stage
from pipelines.data.sources import AmbiguousError, Source


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
    allow_unused: Sequence[str] = (),
    drop: Sequence[str] = (),
    near_duplicates: bool = True,
    unseen: Sequence[str] = (),
    map_tasks: MapTasks | None = None,
    map_tasks_from: int = 0,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Card:
    """Packs `source` into `to`, a new folder or an address, and returns the card.

    shard_samples    most samples in a shard; by default as many as fit in 64 MiB
    resize, quality  images whose shorter side has more than `resize` pixels are shrunk; `quality`
                     is that of the JPEGs that this makes
    allow_unused     patterns of files that no sample has to use, such as "extra/*"
    allow_rejected   how many images, and how many objects, may fail their check: a number, or a
                     share such as "0.5%"
    drop             "boxes" drops a damaged object; otherwise its image is rejected
    near_duplicates  whether to look for near duplicates across the splits
    unseen           classes, or comma-separated lists of classes, for test only: their images are
                     left out of train and val, and those of all other classes out of test
    map_tasks        makes the shards elsewhere, for sources of at least `map_tasks_from` items;
                     None makes them in this process
    progress         called with the number of samples done and in all
    notify           called with each line for the user

    The same input gives the same bytes. Raises TesseraError, and leaves nothing behind, for a `to`
    that is not empty, a source without images or an empty class. If more samples are rejected than
    allowed, or the pack is interrupted, finished shards stay and the same call resumes.
    """
    _check_numbers(shard_samples, resize, quality)
    refuse_occupied(to)
    try:
        chosen = formats.choose(source, format, options or {})
    except AmbiguousError as error:
        raise error.with_commands(source, str(to)) from None
    notify(f"reading {source} as {chosen.name}: {chosen.why}")
    if not hasattr(chosen.importer, "read"):
        if shard_samples or resize or unseen or drop:
            raise UsageError(
                f"{chosen.name} uses the shards in place, as they are",
                hint="leave --shard-samples, --resize, --unseen and --drop out",
            )
        return in_place.index(
            source,
            to,
            options=chosen.options,
            name=name,
            licence=licence,
            seed=seed,
            allow_rejected=allow_rejected,
            allow_unused=allow_unused,
            progress=progress,
            notify=notify,
        )
    reading = image_reading.parse_options(chosen.image_options)
    with stage(to) as staged, reading_images(reading):
        found = _read(chosen, source, str(to), notify)
        account = account_for(found, allow_unused)
        if account:
            notify(str(account))
            account.check()
        else:
            notify(account_file.describe_without_folder(found, source))
        image_checks.check_range(found, reading)
        bare = replace(found, items=(), shared_files=())
        spec = PackSpec(bare, staged.storage.where, None, "", resize, quality, bool(drop), reading)
        how = {
            "format": chosen.name,
            "options": {**chosen.options, **chosen.image_options},
            "seed": seed,
            "resize": [resize, quality],
        }
        if drop:
            how["drop"] = sorted(drop)
        labels = _find_classes(found, unseen)
        if labels:
            how["unseen"] = sorted(labels)
        _report_missing_splits(found, notify)
        if reading.all_frames:
            found = image_checks.expand_frames(found, seed)
        planner = _Planner(found, spec, seed, shard_samples, labels, how)
        plan, digest = planner({})
        spec = replace(spec, plan=digest)
        remote = map_tasks if len(found.items) >= map_tasks_from else None
        note = _report_unseen(found, plan, notify)
        run = PackRun(
            staged,
            plan,
            spec,
            map_tasks=remote,
            progress=progress,
            notify=notify,
            # With unseen classes, what is packed depends on the cut.
            planner=planner if len(planner.cut) > 1 and not labels else None,
        )
        run.pack(allow_rejected, find_near=near_duplicates)
        source = f"{chosen.name}:{found.name}{note}"
        card = run.card(name=name or found.name, source=source, licence=licence)
        if account:
            staged.storage.write(account_file.FILE, account.to_json().encode())
        staged.storage.write(FILE, card.to_json().encode())
    return card


class _Planner:
    """Plans a source, as often as it is needed. `cut` are the splits that images can be moved
    between: train, and those that the source lacks."""

    def __init__(
        self,
        source: Source,
        spec: PackSpec,
        seed: int,
        shard_samples: int | None,
        unseen: frozenset[int],
        how: Mapping[str, Any],
    ) -> None:
        self._source, self._spec, self._how = source, spec, how
        self._seed, self._shard_samples, self._unseen = seed, shard_samples, unseen
        self.cut: Sequence[Split] = ("train", *packing_plan.missing_splits(source))

    def __call__(self, groups: packing_plan.Groups) -> tuple[packing_plan.PackPlan, str]:
        """The plan that cuts none of the groups apart, and its digest."""
        plan = packing_plan.make_plan(
            self._source,
            self._spec,
            seed=self._seed,
            shard_samples=self._shard_samples,
            unseen=self._unseen,
            groups=groups,
        )
        return plan, packing_plan.digest(plan, self._source, self._how)


def _report_missing_splits(source: Source, notify: Callable[[str], None]) -> None:
    """Says which splits are taken from train, where the source has others: without a message they
    would seem to be the source's own."""
    existing = {item.split or "train" for item in source.items}
    missing = [split for split in SPLITS if split not in existing]
    if missing and len(existing) > 1:
        share = f"a tenth of it{' for each' if len(missing) > 1 else ''}"
        notify(f"the source has no {' and no '.join(missing)} split: taken from train, {share}")


def _find_classes(source: Source, given: Sequence[str]) -> frozenset[int]:
    """The labels of the classes in `given`. Raises UsageError for an unknown class."""
    if given and source.task != "classification":
        kind = source.task.replace("_", " ")
        raise UsageError(
            f"--unseen needs a classification data set, this one is for {kind}",
            hint="leave --unseen out",
        )
    labels = set()
    for text in given:
        names = [text] if text in source.classes else text.split(",")
        for name in filter(None, map(str.strip, names)):
            if name not in source.classes:
                raise unknown("class", name, source.classes)
            labels.add(source.classes.index(name))
    return frozenset(labels)


def _report_unseen(
    source: Source, plan: packing_plan.PackPlan, notify: Callable[[str], None]
) -> str:
    """Says what is left out for the unseen classes; returns the note on them for the card."""
    if not plan.unseen:
        return ""
    names = ", ".join(source.classes[label] for label in sorted(plan.unseen))
    notify(
        f"test has the classes {names} and no others, train and val have the rest: "
        f"{plan.left_out:,} images are left out"
    )
    return f", unseen: {names}"


def _read(chosen: Format, source: str, to: str, notify: Callable[[str], None]) -> Source:
    # Workers may have another current folder.
    location = os.path.abspath(source) if os.path.exists(source) else source
    try:
        found = chosen.importer.read(location, chosen.options)
    except AmbiguousError as error:
        raise error.with_commands(source, to) from None
    notify(formats.describe(found))
    for note in found.notes:
        notify(note)
    return found


def _check_numbers(shard_samples: int | None, resize: int | None, quality: int | None) -> None:
    if shard_samples is not None and shard_samples < 1:
        raise UsageError(f"--shard-samples {shard_samples} is too small", hint="give 1 or more")
    if resize is not None and resize < 1:
        raise UsageError(f"--resize {resize} is too small", hint="give 1 or more")
    if quality is not None and resize is None:
        raise UsageError(
            "--quality needs --resize: other images are packed unchanged", hint="add --resize N"
        )
    if quality is not None and not 1 <= quality <= 100:
        raise UsageError(f"--quality {quality} is not a JPEG quality", hint="give 1 to 100")
