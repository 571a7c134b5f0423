"""A tracker and a registry in memory: substitutes for MLflow's that need no service.

In: nothing. Out: `MemoryTracker`, `MemoryRegistry`. One contract test runs on them and on MLflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.interfaces import Decision, Point, Version


class MemoryTracker:
    """A tracker that keeps everything in dictionaries."""

    def __init__(self, run_id: str = "memory") -> None:
        self.run_id = run_id
        self.logged_params: dict[str, str] = {}
        self.logged_tags: dict[str, str] = {}
        self.points: dict[tuple[str, int], list[tuple[int, float]]] = {}
        self.artifacts: list[str] = []
        self.images: dict[tuple[str, int], str] = {}
        self.datasets: list[dict[str, str]] = []
        self.status = "RUNNING"

    def params(self, values: Mapping[str, str]) -> None:
        for key, value in values.items():
            if self.logged_params.setdefault(key, value) != value:
                raise TesseraError(f"parameter {key!r} was logged before with another value")

    def tags(self, values: Mapping[str, str]) -> None:
        self.logged_tags.update(values)

    def metrics(self, points: Sequence[Point]) -> None:
        for point in points:
            for key, value in point.values.items():
                seen = self.points.setdefault((key, point.step), [])
                if (point.time_ms, value) not in seen:
                    seen.append((point.time_ms, value))

    def artifact(self, path: Path, folder: str) -> None:
        if not path.exists():
            raise FileNotFoundError(path)
        self.artifacts.append(f"{folder}/{path.name}" if folder else path.name)

    def image(self, path: Path, key: str, step: int, time_ms: int) -> None:
        if not path.exists():
            raise FileNotFoundError(path)
        self.images[key, step] = path.name

    def dataset(self, *, name: str, digest: str, source: str, split: str) -> None:
        self.datasets.append({"name": name, "digest": digest, "source": source, "split": split})

    def finish(self, status: str) -> None:
        self.status = status

    def link(self) -> str:
        return f"memory:{self.run_id}"


class MemoryRegistry:
    """A registry that keeps versions in a folder and everything else in dictionaries."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._versions: dict[str, list[Version]] = {}
        self._aliases: dict[tuple[str, str], int] = {}
        self._decisions: dict[str, list[Decision]] = {}

    def register(
        self, name: str, directory: Path, *, run_id: str, tags: Mapping[str, str], step: int = 0
    ) -> Version:
        import shutil

        versions = self._versions.setdefault(name, [])
        version = Version(
            name, max((v.number for v in versions), default=0) + 1, run_id, dict(tags)
        )
        shutil.copytree(directory, self._root / name / str(version.number))
        versions.append(version)
        return version

    def version(self, name: str, ref: str | int) -> Version:
        number = self._aliases.get((name, str(ref)), ref)
        for version in self.versions(name):
            if str(version.number) == str(number):
                return version
        raise TesseraError(f"model {name!r} has no version or alias {ref!r}")

    def versions(self, name: str) -> list[Version]:
        def aliases(number: int) -> tuple[str, ...]:
            held = self._aliases.items()
            return tuple(sorted(a for (n, a), v in held if n == name and v == number))

        return [
            Version(v.name, v.number, v.run_id, v.tags, aliases(v.number))
            for v in self._versions.get(name, [])
        ]

    def names(self) -> list[str]:
        return sorted(self._versions)

    def tag(self, version: Version, values: Mapping[str, str]) -> None:
        stored = next(v for v in self._versions[version.name] if v.number == version.number).tags
        assert isinstance(stored, dict)
        stored.update(values)

    def alias(self, name: str, alias: str, number: int) -> None:
        self.version(name, number)
        self._aliases[name, alias] = number

    def delete(self, version: Version) -> None:
        self.version(version.name, version.number)
        kept = [v for v in self._versions[version.name] if v.number != version.number]
        self._versions[version.name] = kept
        held = self._aliases.items()
        self._aliases = {k: v for k, v in held if (k[0], v) != (version.name, version.number)}

    def missing(self, version: Version) -> str:
        return ""

    def decide(self, name: str, decision: Decision) -> None:
        record = self._decisions.setdefault(name, [])
        record.append(replace(decision, number=len(record) + 1))

    def decisions(self, name: str) -> list[Decision]:
        return list(self._decisions.get(name, ()))

    def done(self, name: str, decision: Decision) -> None:
        record = self._decisions[name]
        record[decision.number - 1] = replace(record[decision.number - 1], done=True)

    def download(self, version: Version, to: Path) -> Path:
        import shutil

        target = to / f"{version.name}-{version.number}"
        shutil.copytree(self._root / version.name / str(version.number), target)
        return target

    def link(self, version: Version) -> str:
        return f"memory:{version.name}/{version.number}"
