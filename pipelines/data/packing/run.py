"""Packs all shards of a plan, in this process or elsewhere, and resumes an interrupted pack.

In: a stage and a plan. Out: shards, index, `rejected.jsonl`, `near_duplicates.jsonl`, a card. Must
not know formats, nor what runs the tasks.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models.core.errors import TesseraError
from pipelines.data.card import LEAKAGE_LIMIT, SPLITS, Card, NearDuplicates, Split, SplitCard
from pipelines.data.packing import near_duplicates, shard_records
from pipelines.data.packing.class_checks import check_classes, count_planned
from pipelines.data.packing.near_duplicates import Fingerprints
from pipelines.data.packing.plan import Groups, PackPlan
from pipelines.data.packing.shard import TWO_SPLITS, PackSpec, ShardPlan, find_record, pack_shard
from pipelines.data.packing.shard_records import ShardRecord
from pipelines.data.packing.staging import WORK, Stage
from pipelines.data.packing.statistics import (
    REJECTED,
    ImageStatistics,
    Rejections,
    ResumableError,
    dropped_object,
    rejection,
    to_json_lines,
)
from pipelines.data.shards import finish_split

_GROUPS = f"{WORK}/groups.json"
"""Key -> name of its group, of images that the first plan has put apart."""
Progress = Callable[[int, int], None]
"""Called with the number of samples done, and of all samples."""
Work = Callable[[PackSpec, ShardPlan], Any]
MapTasks = Callable[[Work, PackSpec, Iterable[ShardPlan]], Generator[tuple[int, Any], None, None]]
"""Calls the function for each shard and yields (position of the shard, result) as they come. It
raises what the function raises."""


def map_here(
    work: Work, spec: PackSpec, shards: Iterable[ShardPlan]
) -> Generator[tuple[int, Any], None, None]:
    """The `MapTasks` that runs in this process."""
    for number, shard_plan in enumerate(shards):
        yield number, work(spec, shard_plan)


class Planner(Protocol):
    """How a pack whose splits are cut from train is planned again.

    cut  the splits that images can be moved between: train, and those that are cut from it
    """

    cut: Sequence[Split]

    def __call__(self, groups: Groups) -> tuple[PackPlan, str]:
        """The plan that cuts none of the groups apart, and its digest."""


class PackRun:
    """One pack of a plan. `map_tasks` makes the shards elsewhere; None makes them in this process.
    With a `planner`, copies and near duplicates aren't put into different splits by the cut."""

    def __init__(
        self,
        staged: Stage,
        plan: PackPlan,
        spec: PackSpec,
        *,
        map_tasks: MapTasks | None,
        progress: Progress | None,
        notify: Callable[[str], None],
        planner: Planner | None = None,
    ) -> None:
        self._staged, self._plan, self._spec = staged, plan, spec
        self._planner, self._first_plan = planner, plan
        self._groups: Groups = {}
        self._progress = progress
        self._map_tasks, self._notify = map_tasks, notify
        self._shards: list[ShardPlan] = list(plan.shards)
        self._records: dict[int, ShardRecord] = {}
        self._counter = _ProgressCounter(plan.samples, progress)
        self._rejected: list[dict[str, str]] = []
        self._near = NearDuplicates()

    def pack(self, allow_rejected: str, *, find_near: bool) -> None:
        """Makes all shards.

        Raises ResumableError if more samples are rejected than `allow_rejected`, or if a shard
        can't be made.
        """
        rejections = Rejections(allow_rejected, self._plan.total)
        resumed = self._staged.begin(self._spec.plan)
        if self._staged.replaced:
            self._notify("starting again: the interrupted pack had another source or other options")
        self._spec = replace(self._spec, scratch=self._staged.scratch())
        try:
            if resumed:
                self._follow_groups(self._stored_groups())
                self._find_packed()
            self._make_rest()
            self._keep_groups_together(find_near)
            self._reject(rejections)
            self._list_copies()
            if find_near:
                self._list_near_duplicates()
        except ResumableError:
            raise
        except TesseraError as error:
            hint = "the same command resumes with the shards that are packed"
            raise ResumableError(
                error.message, hint=f"{error.hint}; {hint}" if error.hint else hint
            ) from error
        except KeyboardInterrupt:
            kept = f"{len(self._records)} of {len(self._shards)} shards are kept"
            self._notify(f"stopped: {kept}, the same command resumes with them")
            raise

    def card(self, *, name: str, source: str, licence: str) -> Card:
        """Writes the index of each split, and returns the card."""
        counts = {split: self._counts(split) for split in SPLITS}
        self._check_classes(counts, name)
        statistics = ImageStatistics()
        for record in self._records.values():
            statistics.merge(record.statistics)
        if count := statistics.several_frames:
            self._notify(
                f"{count:,} files have several frames or pages: the first is packed; to pack all: "
                "--option frames=all"
            )
        splits = {split: self._finish(split) for split in SPLITS}
        data = self._spec.source
        return Card(
            name=name,
            task=data.task,
            classes=data.classes,
            image=statistics.card().read_with(self._spec.reading),
            splits={
                split: card.model_copy(update={"class_counts": counts[split]})
                for split, card in splits.items()
                if card.samples
            },
            source=source,
            licence=licence,
            rejected=len(self._rejected),
            leakage=self._near,
        ).sealed()

    def _find_packed(self) -> None:
        """Finds the shards that an earlier call has packed."""
        known = shard_records.known(self._staged.storage)
        numbers = [n for n, shard_plan in enumerate(self._shards) if shard_plan.path in known]
        for number, record in self._each(find_record, numbers):
            if record is not None:
                self._add_record(number, record)
                self._counter.add(len(self._shards[number].items))
        if self._records:
            self._notify(
                f"resuming: {len(self._records)} of {len(self._shards)} shards are packed already"
            )

    def _keep_groups_together(self, find_near: bool) -> None:
        """Packs again if the cut has put many copies or near duplicates into different splits.
        Which images belong together doesn't depend on the plan, so the second plan is the last."""
        if self._planner is None:
            return
        while (groups := self._find_groups(self._planner.cut, find_near)) != self._groups:
            count, images = len(set(groups.values())), len(groups)
            alike = f"copies and near duplicates: {images:,} images in {count:,} groups"
            if missing := self._lost_splits(groups):
                self._notify(
                    f"{alike}; without cutting a group apart nothing is left for "
                    f"{' and '.join(missing)}, so the cut stays: metrics will be too good"
                )
                return
            self._staged.storage.write(_GROUPS, json.dumps(groups, sort_keys=True).encode())
            self._follow_groups(groups)
            self._notify(f"{alike}; packing again with each group in one split")
            self._make_rest()

    def _lost_splits(self, groups: Groups) -> list[Split]:
        """Splits that the first plan has, and the plan for these groups doesn't."""
        assert self._planner is not None
        plan, _ = self._planner(groups)
        left = {shard_plan.split for shard_plan in plan.shards}
        had = {shard_plan.split for shard_plan in self._first_plan.shards}
        return [split for split in SPLITS if split in had - left]

    def _find_groups(self, cut: Sequence[Split], find_near: bool) -> Groups:
        """The images that belong together; none if the first plan puts few of them apart."""
        fingerprints = self._fingerprints()
        few = not self._groups and (
            fingerprints.share_cut_apart(cut, near=find_near) <= LEAKAGE_LIMIT
        )
        if few:
            return {}
        groups = fingerprints.groups(cut, near=find_near)
        split_of = {item.key: plan.split for plan in self._first_plan.shards for item in plan.items}
        apart = any(split_of[key] != split_of[name] for key, name in groups.items())
        return groups if apart else {}

    def _follow_groups(self, groups: Groups) -> None:
        """Follows the plan for these groups from now on; removes the shards that it doesn't
        have."""
        if groups == self._groups or self._planner is None:
            return
        self._groups = groups
        plan, digest = self._planner(groups)
        kept = {shard_plan.path for shard_plan in plan.shards}
        for shard_plan in self._shards:
            if shard_plan.path not in kept:
                self._staged.storage.remove(shard_plan.path)
        self._plan, self._shards, self._records = plan, list(plan.shards), {}
        self._spec = replace(self._spec, plan=digest)
        self._counter = _ProgressCounter(plan.samples, self._progress)

    def _stored_groups(self) -> Groups:
        """The groups that an interrupted pack has found; none if it hasn't."""
        storage = self._staged.storage
        if storage.size(_GROUPS) is None:
            return {}
        groups: Groups = json.loads(storage.read(_GROUPS))
        return groups

    def _make_rest(self) -> None:
        self._make([n for n in range(len(self._shards)) if n not in self._records])

    def _make(self, numbers: Sequence[int]) -> None:
        work = pack_shard if self._map_tasks else partial(pack_shard, step=self._counter.step)
        for number, record in self._each(work, numbers):
            self._add_record(number, record)
            if self._map_tasks:
                self._counter.add(len(self._shards[number].items))

    def _each(self, work: Work, numbers: Sequence[int]) -> Generator[tuple[int, Any], None, None]:
        shards = [self._shards[number] for number in numbers]
        with closing((self._map_tasks or map_here)(work, self._spec, shards)) as results:
            for index, result in results:
                yield numbers[index], result

    def _add_record(self, number: int, record: ShardRecord) -> None:
        storage, path = self._staged.storage, record.shard.path
        if record.shard.samples and not storage.remote and storage.size(path) is None:
            raise TesseraError(
                f"the shard {path} is not in {storage.where}: the worker that packed it doesn't "
                "share this disk",
                hint="give a folder that all nodes share, or an address such as s3://BUCKET/FOLDER",
            )
        self._records[number] = record

    def _reject(self, rejections: Rejections) -> None:
        """Checks the number of rejected samples, with those that are in two splits, and packs the
        shards that have such samples again, without them. Copies that only the cut of missing
        splits has put apart are left out too, and need not be allowed."""
        doubled = self._fingerprints().exact_duplicates()
        rejections.extend(self._rejected_rows())
        cut_apart = 0
        for number, copies in sorted(doubled.items()):
            for item in self._shards[number].items:
                if item.key in copies and not copies[item.key].cut_apart:
                    rejections.add(item.key, item.origin, TWO_SPLITS, copies[item.key].detail)
            cut_apart += sum(copy.cut_apart for copy in copies.values())
        rejections.check(self._staged.storage)
        dropped = self._dropped_rows()
        rejections.check_objects(self._staged.storage, dropped, self._objects())
        if doubled:
            for number, copies in doubled.items():
                without = {key: copy.detail for key, copy in copies.items()}
                self._shards[number] = replace(self._shards[number], without=without)
            self._counter.stop()
            self._make(sorted(doubled))
        self._rejected = self._rejected_rows()
        if cut_apart:
            self._notify(f"copies of val and test images left out of train: {cut_apart:,}")
        if dropped:
            self._notify(f"objects that are left out: {len(dropped)}; see {REJECTED}")
        rows = [*self._rejected, *self._dropped_rows()]
        if rows:
            self._staged.storage.write(REJECTED, to_json_lines(rows))
        else:
            self._staged.storage.remove(REJECTED)

    def _rejected_rows(self) -> list[dict[str, str]]:
        packed = (row for _, record in sorted(self._records.items()) for row in record.rejected)
        return [*self._plan.rejected, *packed]

    def _dropped_rows(self) -> list[dict[str, str]]:
        """The objects that no packed image has."""
        orphans = self._spec.source.orphans
        rows = [dropped_object(rejection("", "", *orphan), "") for orphan in orphans]
        for _, record in sorted(self._records.items()):
            rows += record.dropped
        return rows

    def _objects(self) -> dict[str, int]:
        """Objects of each class in all splits."""
        total = np.zeros(len(self._spec.source.classes), np.int64)
        for record in self._records.values():
            total += np.array(record.counts, np.int64)
        return dict(zip(self._spec.source.classes, total.tolist()))

    def _fingerprints(self) -> Fingerprints:
        records = [self._records[number] for number in range(len(self._shards))]
        return Fingerprints(self._staged.storage, self._shards, records)

    def _list_near_duplicates(self) -> None:
        rows, self._near = self._fingerprints().near_duplicates()
        if rows:
            self._staged.storage.write(near_duplicates.FILE, to_json_lines(rows))
            self._notify(
                f"near duplicates across splits: {self._near.near} pairs; see "
                f"{near_duplicates.FILE}"
            )
        else:
            self._staged.storage.remove(near_duplicates.FILE)

    def _list_copies(self) -> None:
        """Lists images of a split with the same pixels, and names those with two classes."""
        groups = self._fingerprints().copies(self._spec.source.classes)
        if not groups:
            self._staged.storage.remove(near_duplicates.COPIES)
            return
        self._staged.storage.write(near_duplicates.COPIES, to_json_lines(groups))
        count = sum(len(group["images"]) - 1 for group in groups)
        self._notify(f"copies within a split: {count:,} images; see {near_duplicates.COPIES}")
        for line in near_duplicates.describe_conflicts(groups):
            self._notify(line)

    def _counts(self, split: Split) -> dict[str, int]:
        classes = self._spec.source.classes
        total = np.zeros(len(classes), np.int64)
        for number, record in self._records.items():
            if self._shards[number].split == split:
                total += np.array(record.counts, np.int64)
        return dict(zip(classes, total.tolist()))

    def _check_classes(self, counts: dict[Split, dict[str, int]], name: str) -> None:
        train = [r for n, r in self._records.items() if self._shards[n].split == "train"]
        if not any(record.shard.samples for record in train):
            raise TesseraError(f"{name} has no train images left", hint="see which were rejected")
        source = self._spec.source
        planned = ((plan.split, item.label) for plan in self._shards for item in plan.items)
        unseen = frozenset(source.classes[label] for label in self._plan.unseen)
        check_classes(source, name, count_planned(source, planned), counts, unseen, self._notify)

    def _finish(self, split: Split) -> SplitCard:
        storage = self._staged.storage
        done = (r for n, r in sorted(self._records.items()) if self._shards[n].split == split)
        written = [(r.shard, shard_records.load_rows(storage, r)) for r in done if r.shard.samples]
        with tempfile.TemporaryDirectory(dir=self._spec.scratch) as temporary:
            (Path(temporary) / split).mkdir()
            card = finish_split(Path(temporary), split, written)
            if card.samples:
                storage.put(Path(temporary) / card.index, card.index)
        return card


class _ProgressCounter:
    """Calls `progress` every 64 samples: at each it would cost more than packing a small image."""

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

    def stop(self) -> None:
        """Counts no further: shards that are packed again are not counted twice."""
        self._progress = None
