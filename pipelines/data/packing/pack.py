"""From a raw source to a packed data set.

In: a folder of images, or the word of a bundled set. Out: shards and a card, or one clear error and
nothing written. Must not know Ray or MLflow. An importer is a file in `importers/`; the folder is
the registry, and `sources.py` says what it has. `packing_plan.py` says what goes into which shard,
`shard_packing.py` makes one, and `spread` says where that is done.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from models.core.errors import TesseraError, UsageError, unknown
from pipelines.data import importers
from pipelines.data.card import FILE, SPLITS, Card
from pipelines.data.packing import plan as packing_plan
from pipelines.data.packing.run import Progress, Run, Spread
from pipelines.data.packing.shard import Shared
from pipelines.data.packing.staging import refuse_occupied, stage
from pipelines.data.sources import IMAGE_SUFFIXES, TABLES, Source, find_files, find_images


def formats() -> list[str]:
    """Names of all importers, without importing one."""
    return sorted(m.name for m in pkgutil.iter_modules(importers.__path__) if not m.ispkg)


def importer(name: str) -> Any:
    """The importer called `name`; raises UsageError with the nearest known name."""
    if name not in formats():
        raise unknown("format", name, formats())
    return importlib.import_module(f"{importers.__name__}.{name}")


def recognise(source: str) -> tuple[str, str]:
    """(format, what speaks for it). Raises TesseraError where none or several fit."""
    fitting, refused = {}, []
    for name in formats():
        try:
            why = importer(name).recognises(source)
        except TesseraError as error:  # looks like its own, and is wrong
            refused.append(error)
            continue
        if why:
            fitting[name] = why
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    if fitting:
        listed = "; ".join(f"{name} ({why})" for name, why in fitting.items())
        raise UsageError(f"{source} could be {listed}", hint="say which: --format NAME")
    if refused:
        raise refused[0]
    raise _unrecognised(source)


def _unrecognised(source: str) -> TesseraError:
    folder = Path(source)
    if not folder.exists():
        words = ", ".join(name for name in formats() if importer(name).recognises(name))
        return UsageError(
            f"there is no {source}", hint=f"give a folder, or the name of a bundled set: {words}"
        )
    if not folder.is_dir():
        table = folder.suffix.lower() in TABLES
        return UsageError(
            f"{source} is a file" + (", and no table as it should be" if table else ""),
            hint="see what is wrong with it: --format csv"
            if table
            else "give the folder with the images; unpack it",
        )
    if next(find_images(folder), None) is None:
        return TesseraError(
            f"{source} has no images", hint=f"files named {' '.join(sorted(IMAGE_SUFFIXES))} count"
        )
    tables = [path for path in find_files(folder) if path.lower().endswith(TABLES)]
    if tables:
        return TesseraError(
            f"{source} has images, and {tables[0]}, which is no table that is known",
            hint="if it has the labels: --format csv, with --option label_column=… or delimiter=…; "
            "if not: --format images, or image_folder",
        )
    return TesseraError(
        f"{source} is of no known format ({', '.join(formats())})",
        hint="put each class in a folder of its own: SOURCE/CLASS/IMAGE.jpg",
    )


def choose(
    source: str, format: str | None, options: Mapping[str, str]
) -> tuple[str, Any, dict[str, str], str]:
    """(name, importer, its options, what speaks for it). `format` may be NAME or NAME:WORD, which is
    the option `name`. Raises UsageError for an option that the importer hasn't."""
    name, _, word = (format or "").partition(":")
    name, why = (name, "as told") if format else recognise(source)
    reader = importer(name)
    given = {**options, **({"name": word} if word else {})}
    for option in given:
        if option not in reader.OPTIONS:
            if not reader.OPTIONS:
                raise UsageError(f"{name} takes no options", hint=f"leave {option!r} out")
            raise unknown(f"option of {name}", option, reader.OPTIONS)
    return name, reader, given, why


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
    spread: Spread | None = None,
    spread_from: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Card:
    """Packs `source` into `to`, a new folder or an address, and gives the card.

    `shard_samples` is the most that a shard has; by default as many as fit in 64 MiB. `resize` is
    the most pixels that the shorter side of an image keeps, `quality` that of the JPEGs made then.
    `allow_rejected` is how many samples may fail their check: a number, or a share like "0.5%".
    `near` says whether images of two splits that look alike are sought. `unseen` are classes, or
    lists of classes with commas, that only test is to have: their images are left out of train and
    val, and those of the other classes out of test. `spread` is where shards are made, for sources
    of `spread_from` items or more; else it is here.

    Raises TesseraError, and leaves nothing behind, for an occupied `to`, a source without images or
    an empty class. Where more samples are rejected than allowed, and after an interruption, what is
    done stays, and the same call goes on with it. The same input gives the same bytes.
    """
    _check_numbers(shard_samples, resize, quality)
    refuse_occupied(to)
    chosen, reader, given, why = choose(source, format, options or {})
    say(f"{source} is read as {chosen}: {why}")
    if hasattr(reader, "index"):  # of shards that stay where they lie
        if shard_samples or resize or unseen:
            raise UsageError(
                f"{chosen} leaves shards where they lie",
                hint="leave --shard-samples, --resize and --unseen out",
            )
        told: dict[str, Any] = {
            "name": name,
            "licence": licence,
            "seed": seed,
            "allow_rejected": allow_rejected,
        }
        told |= {"options": given, "progress": progress, "say": say}
        return cast(Card, reader.index(source, str(to), **told))
    with stage(to) as staged:
        found = _read(reader, source, given, say)
        bare = replace(found, items=())
        shared = Shared(bare, staged.place.where, None, "", resize, quality)
        how = {"format": chosen, "options": given, "seed": seed, "resize": [resize, quality]}
        labels = _find_classes(found, unseen)
        if labels:
            how["unseen"] = sorted(labels)
        _tell_cut(found, say)
        plan = packing_plan.make_plan(
            found, shared, seed=seed, shard_samples=shard_samples, unseen=labels
        )
        shared = replace(shared, plan=packing_plan.digest(plan, found, how))
        afar = spread if len(found.items) >= spread_from else None
        note = _tell_unseen(found, plan, say)
        run = Run(staged, plan, shared, spread=afar, progress=progress, say=say)
        run.pack(allow_rejected, near=near)
        source = f"{chosen}:{found.name}{note}"
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


def _tell_unseen(source: Source, plan: packing_plan.Plan, say: Callable[[str], None]) -> str:
    """Says what is left out for the unseen classes; gives what the card says of them."""
    if not plan.unseen:
        return ""
    names = ", ".join(source.classes[label] for label in sorted(plan.unseen))
    say(
        f"only test has the classes {names}, and no other: {plan.left_out:,} images are left out "
        "for that"
    )
    return f", unseen: {names}"


def _read(
    reader: Any, source: str, options: Mapping[str, str], say: Callable[[str], None]
) -> Source:
    # Workers may stand in another folder.
    place = os.path.abspath(source) if os.path.exists(source) else source
    found: Source = reader.read(place, options)
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
