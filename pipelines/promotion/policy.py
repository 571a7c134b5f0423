"""What a version must be to answer as champion: a short file, checked before anything is measured.

In: YAML or JSON. Out: `Policy`, and what has to be measured for it. A rule about a figure that an
evaluation doesn't have fails, and says so. Must not know how anything is measured.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.core.errors import UsageError

Share = Annotated[float, Field(ge=0)]


COSTS = frozenset(
    {
        "parameters",
        "flops",
        "size_bytes",
        "latency_p50_ms",
        "latency_p95_ms",
        "images_per_second",
        "best_batch",
        "peak_memory_bytes",
    }
)
"""Figures of a report that are measured only where they are asked for."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Losses(_Frozen):
    """The most that a candidate may be worse than the champion; null for as much as it likes.

    `classes`: in the figure of any class, where the interval of the difference says that it is a
    loss. `robustness`: in the mean over the corruptions. `latency`
    and `size`: as a share of the champion's, so that 0.25 allows a quarter more."""

    classes: Share | None = None
    robustness: Share | None = None
    latency: Share | None = None
    size: Share | None = None


class Policy(_Frozen):
    """`floors` and `ceilings` are for any figure of the report, by name. `margin`: by how much the
    primary figure must be better than the champion's; the interval of the difference with
    `confidence` must lie above it. A negative margin lets a candidate pass that is not much worse.
    `leakage`: the largest share of the test images that look like images it was trained on; small
    images of few strokes look alike without being the same."""

    floors: dict[str, float] = {}
    ceilings: dict[str, float] = {}
    margin: float = 0.0
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    largest_losses: Losses = Losses()
    leakage: Annotated[float, Field(ge=0, le=1)] | None = 0.02

    @property
    def needs_robustness(self) -> bool:
        names = {*self.floors, *self.ceilings}
        spoiled = any(name == "robustness" or name.startswith(("fgsm_", "pgd_")) for name in names)
        return spoiled or self.largest_losses.robustness is not None

    @property
    def needs_costs(self) -> bool:
        named = not COSTS.isdisjoint({*self.floors, *self.ceilings})
        losses = self.largest_losses
        return named or losses.latency is not None or losses.size is not None


CLASS_LOSSES = {
    "classification": 0.05,
    "detection": 0.1,
    "instance_segmentation": 0.1,
    "semantic_segmentation": 0.1,
}
"""What a class may lose, where the user says nothing; tasks without classes have no such rule."""


def default(task: str) -> Policy:
    """The policy for a task where none is given."""
    return Policy(largest_losses=Losses(classes=CLASS_LOSSES.get(task)))


def read(path: Path) -> Policy:
    """A policy from a file. Every mistake in it is a UsageError that names the place."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no policy {path}", hint="name a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} can't be read as YAML: {error}") from None
    return build({} if tree is None else tree, str(path))


def build(tree: Any, where: str = "the policy") -> Policy:
    if not isinstance(tree, dict):
        raise UsageError(f"{where} is no mapping", hint="write lines like: margin: 0.01")
    try:
        return Policy.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = [*Policy.model_fields, *(f"largest_losses.{n}" for n in Losses.model_fields)]
            near = difflib.get_close_matches(place, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it can have: {', '.join(known)}"
            raise UsageError(f"{where} has no {place!r}", hint=hint) from None
        raise UsageError(
            f"{where}: {place or 'it'} = {first['input']!r}: {first['msg'].lower()}"
        ) from None
