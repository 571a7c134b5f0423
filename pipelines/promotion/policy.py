"""The promotion policy: the rules that a version must pass to become champion.

In: YAML or JSON, checked before anything is measured. Out: `Policy`, and what has to be measured
for it. A rule about a metric that the evaluation doesn't have fails. Must not know how anything is
measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.core.errors import UsageError, nearest, value_problem
from pipelines import settings_file
from pipelines.data.card import LEAKAGE_LIMIT

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
"""Values of a report that are measured only if a rule needs them."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Losses(_Frozen):
    """How much worse than the champion a candidate may be; null for no limit.

    `classes`: in the metrics of any class, if the loss is statistically significant. `robustness`:
    in the mean over the corruptions. `latency` and `size`: as a share of the champion's, so 0.25
    allows 25 % more.
    """

    classes: Share | None = None
    robustness: Share | None = None
    latency: Share | None = None
    size: Share | None = None


class Policy(_Frozen):
    """The rules of a promotion.

    `floors` and `ceilings`: limits of any metric or cost in the report, by name. `margin`: the
    required gain in the primary metric; the confidence interval of the gain must lie above it. A
    negative margin accepts a candidate that is slightly worse. `confidence`: of that interval.
    `leakage`: the largest share of test images that may be near duplicates of training images.
    """

    floors: dict[str, float] = {}
    ceilings: dict[str, float] = {}
    margin: float = 0.0
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    largest_losses: Losses = Losses()
    leakage: Annotated[float, Field(ge=0, le=1)] | None = LEAKAGE_LIMIT

    @property
    def needs_robustness(self) -> bool:
        names = {*self.floors, *self.ceilings}
        limited = any(name == "robustness" or name.startswith(("fgsm_", "pgd_")) for name in names)
        return limited or self.largest_losses.robustness is not None

    @property
    def needs_costs(self) -> bool:
        limited = not COSTS.isdisjoint({*self.floors, *self.ceilings})
        losses = self.largest_losses
        return limited or losses.latency is not None or losses.size is not None


CLASS_LOSSES = {
    "classification": 0.05,
    "detection": 0.1,
    "instance_segmentation": 0.1,
    "semantic_segmentation": 0.1,
}
"""Default of `Losses.classes` by task; tasks without classes have no such rule."""


def default(task: str) -> Policy:
    """The default policy of a task."""
    return Policy(largest_losses=Losses(classes=CLASS_LOSSES.get(task)))


def read(path: Path) -> Policy:
    """Reads a policy from a file. Raises UsageError that names what is wrong in it."""
    tree = settings_file.read(path, "policy", example="margin: 0.01", may_be_empty=True)
    return build(tree, str(path))


def build(tree: Any, where: str = "the policy") -> Policy:
    """Builds a policy from plain data. `where` begins the message of a UsageError."""
    if not isinstance(tree, dict):
        raise UsageError(f"{where} is not a mapping", hint="write lines like: margin: 0.01")
    try:
        return Policy.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = [*Policy.model_fields, *(f"largest_losses.{n}" for n in Losses.model_fields)]
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"valid keys: {', '.join(known)}"
            raise UsageError(f"{where} has no key {key!r}", hint=hint) from None
        raise UsageError(
            f"{where}: {key or 'it'} = {settings_file.short(first['input'])}: "
            f"{value_problem(first['msg'])}"
        ) from None
