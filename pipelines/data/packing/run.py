"""A pack: all its shards, here or elsewhere, from where it was left, to the card.

In: a stage, a plan, and where the work is done. Out: shards, index, `rejected.jsonl`,
`leakage.jsonl`, a card. Must not know formats, nor who runs the work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.core.errors import TesseraError
from pipelines.data.card import SPLITS, Card, Leakage, Split, SplitCard
from pipelines.data.packing import near_duplicates, shard_records
from pipelines.data.packing.near_duplicates import Fingerprints
from pipelines.data.packing.plan import PackPlan
from pipelines.data.packing.shard import TWO_SPLITS, PackSpec, ShardPlan, find_record, pack_shard
from pipelines.data.packing.shard_records import ShardRecord
from pipelines.data.packing.staging import Stage
from pipelines.data.packing.statistics import (
    REJECTED,
    ImageStatistics,
    Rejections,
    ResumableError,
    lines_of,
)
from pipelines.data.shards import finish_split

Progress = Callable[[int, int], None]
"""Called with the number of samples looked at, and of all."""
Work = Callable[[PackSpec, ShardPlan], Any]
MapTasks = Callable[[Work, PackSpec, Iterable[ShardPlan]], Generator[tuple[int, Any], None, None]]
"""Calls the function with `PackSpec` and each part, and gives each part's number with what it gave, as
they come. It raises what the function raised."""


def map_here(
    work: Work, spec: PackSpec, parts: Iterable[ShardPlan]
) -> Generator[tuple[int, Any], None, None]:
    """The `MapTasks` of this process."""
    for number, shard_plan in enumerate(parts):
        yield number, work(spec, shard_plan)


class PackRun:
    """One pack of a plan at a stage. `map_tasks` is where shards are made; None for here."""

    def __init__(
        self,
        staged: Stage,
        plan: PackPlan,
        spec: PackSpec,
        *,
        map_tasks: MapTasks | None,
        progress: Progress | None,
        say: Callable[[str], None],
    ) -> None:
        self._staged, self._plan, self._shared = staged, plan, spec
        self._spread, self._say = map_tasks, say
        self._parts: list[ShardPlan] = list(plan.parts)
        self._done: dict[int, ShardRecord] = {}
        self._seen = _Counter(plan.samples, progress)
        self._rejected: list[dict[str, str]] = []
        self._leakage = Leakage()

    def pack(self, allow_rejected: str, *, near: bool) -> None:
        """Makes all shards. Raises Kept where more samples are rejected than `allow_rejected`, and
        where shards can't be made."""
        rejections = Rejections(allow_rejected, self._plan.total)
        resumed = self._staged.begin(self._shared.plan)
        if self._staged.replaced:
            self._say("starts again: what was there is of another source, or of other options")
        self._shared = replace(self._shared, scratch=self._staged.scratch())
        try:
            if resumed:
                self._look()
            self._make([n for n in range(len(self._parts)) if n not in self._done])
            self._judge(rejections)
            if near:
                self._find_near()
        except ResumableError:
            raise
        except TesseraError as error:
            hint = "the same command goes on with the shards that are packed"
            raise ResumableError(
                error.message, hint=f"{error.hint}; {hint}" if error.hint else hint
            ) from error
        except KeyboardInterrupt:
            kept = f"{len(self._done)} of {len(self._parts)} shards are kept"
            self._say(f"stopped: {kept}, the same command goes on with them")
            raise

    def card(self, *, name: str, source: str, licence: str) -> Card:
        """Writes the index of each split, and gives the card."""
        counts = {split: self._counts(split) for split in SPLITS}
        self._check_classes(counts, name)
        statistics = ImageStatistics()
        for record in self._done.values():
            statistics.merge(record.statistics)
        splits = {split: self._finish(split) for split in SPLITS}
        spec = self._shared.source
        return Card(
            name=name,
            task=spec.task,
            classes=spec.classes,
            image=statistics.card(),
            splits={
                split: card.model_copy(update={"class_counts": counts[split]})
                for split, card in splits.items()
                if card.samples
            },
            source=source,
            licence=licence,
            rejected=len(self._rejected),
            leakage=self._leakage,
        ).sealed()

    def _look(self) -> None:
        """Finds what an earlier call has packed."""
        known = shard_records.known(self._staged.place)
        numbers = [n for n, shard_plan in enumerate(self._parts) if shard_plan.path in known]
        for number, record in self._each(find_record, numbers):
            if record is not None:
                self._note(number, record)
                self._seen.add(len(self._parts[number].items))
        if self._done:
            self._say(f"goes on: {len(self._done)} of {len(self._parts)} shards are there")

    def _make(self, numbers: Sequence[int]) -> None:
        work = pack_shard if self._spread else partial(pack_shard, step=self._seen.step)
        for number, record in self._each(work, numbers):
            self._note(number, record)
            if self._spread:
                self._seen.add(len(self._parts[number].items))

    def _each(self, work: Work, numbers: Sequence[int]) -> Generator[tuple[int, Any], None, None]:
        parts = [self._parts[number] for number in numbers]
        with closing((self._spread or map_here)(work, self._shared, parts)) as results:
            for place, result in results:
                yield numbers[place], result

    def _note(self, number: int, record: ShardRecord) -> None:
        place, path = self._staged.place, record.shard.path
        if record.shard.samples and not place.remote and place.size(path) is None:
            raise TesseraError(
                f"the shard {path} is not in {place.where}: the worker that packed it has other "
                "disks",
                hint="give a folder that all nodes share, or an address such as s3://BUCKET/FOLDER",
            )
        self._done[number] = record

    def _judge(self, rejections: Rejections) -> None:
        """Counts what was rejected, with images that are in two splits; packs the shards again that
        have such."""
        exact_duplicates = self._prints().exact_duplicates()
        rejections.extend(self._rows())
        for number, keys in sorted(exact_duplicates.items()):
            for item in self._parts[number].items:
                if item.key in keys:
                    rejections.add(item.key, item.origin, TWO_SPLITS, keys[item.key])
        rejections.judge(self._staged.place)
        if exact_duplicates:
            for number, keys in exact_duplicates.items():
                self._parts[number] = replace(self._parts[number], without=keys)
            self._seen.rest()
            self._make(sorted(exact_duplicates))
        self._rejected = self._rows()
        if self._rejected:
            self._staged.place.write(REJECTED, lines_of(self._rejected))
        else:
            self._staged.place.remove(REJECTED)

    def _rows(self) -> list[dict[str, str]]:
        done = (row for _, record in sorted(self._done.items()) for row in record.rejected)
        return [*self._plan.rejected, *done]

    def _prints(self) -> Fingerprints:
        done = [self._done[number] for number in range(len(self._parts))]
        return Fingerprints(self._staged.place, self._parts, done)

    def _find_near(self) -> None:
        rows, self._leakage = self._prints().near()
        if rows:
            self._staged.place.write(near_duplicates.FILE, lines_of(rows))
            self._say(
                f"pairs of images in two splits that look alike: {self._leakage.near}; see "
                f"{near_duplicates.FILE}"
            )
        else:
            self._staged.place.remove(near_duplicates.FILE)

    def _counts(self, split: Split) -> dict[str, int]:
        classes = self._shared.source.classes
        total = np.zeros(len(classes), np.int64)
        for number, record in self._done.items():
            if self._parts[number].split == split:
                total += np.array(record.counts, np.int64)
        return dict(zip(classes, total.tolist()))

    def _check_classes(self, counts: dict[Split, dict[str, int]], name: str) -> None:
        """A class without train images is refused where each image has one, else said; but for
        those that are to have none."""
        train = [r for n, r in self._done.items() if self._parts[n].split == "train"]
        if not any(record.shard.samples for record in train):
            raise TesseraError(f"{name}: no train image is left", hint="see which were rejected")
        unseen = {self._shared.source.classes[label] for label in self._plan.unseen}
        trained = counts["train"].items()
        empty = [label for label, count in trained if not count and label not in unseen]
        if empty and self._shared.source.task == "classification":
            raise TesseraError(
                f"{name}: no train image of the class {empty[0]!r} is left",
                hint="see which were rejected, or remove the class",
            )
        for label in empty:
            others = [split for split in SPLITS if counts[split][label]]
            also = f"; {' and '.join(others)} have it" if others else ""
            self._say(f"no train image has the class {label!r}{also}")

    def _finish(self, split: Split) -> SplitCard:
        place = self._staged.place
        done = (r for n, r in sorted(self._done.items()) if self._parts[n].split == split)
        written = [(r.shard, shard_records.load_rows(place, r)) for r in done if r.shard.samples]
        with tempfile.TemporaryDirectory(dir=self._shared.scratch) as temporary:
            (Path(temporary) / split).mkdir()
            card = finish_split(Path(temporary), split, written)
            if card.samples:
                place.put(Path(temporary) / card.index, card.index)
        return card


class _Counter:
    """Tells `progress` now and then: not at each sample, which would cost more than packing it."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def step(self) -> None:
        self._done += 1
        if self._progress and (self._done % 64 == 0 or self._done == self._total):
            self._progress(self._done, self._total)

    def add(self, samples: int) -> None:
        self._done += samples
        if self._progress:
            self._progress(self._done, self._total)

    def rest(self) -> None:
        """All are counted; what is packed again is not counted twice."""
        self._progress = None
