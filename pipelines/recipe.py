"""One frozen tree with every setting that a training depends on.

In: a family's name and overrides, or a YAML or JSON file. Out: a `Recipe`, which goes to the
workers, to MLflow, into checkpoints and into the registered model. Must not know any service.
`with_overrides` is the only way to change it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

import models
from models.core.errors import UsageError, unknown, value_problem
from models.metrics import custom as custom_metrics
from pipelines import settings_file
from pipelines.recipe_sections import (
    Checkpoint,
    Data,
    Frozen,
    Optim,
    Schedule,
    Train,
    Workers,
)

if TYPE_CHECKING:  # loads torch
    from models.core.family import Metric


class Recipe(Frozen):
    """Everything that a training depends on. Digests are filled in when a training starts."""

    family: str
    """Name of the family, or of a module with one."""
    variant: str = "base"
    """Variant of the family."""
    judge: str = ""
    """Registered classifier, as `models:/NAME/3`, that judges the images a generator makes."""
    judge_digest: str = ""
    """Digest of the judge's files."""
    start_from: str = ""
    """Registered version of the same family, as `models:/NAME/3`, with whose weights the training
    begins. Classes that both have keep their part of the head."""
    start_from_digest: str = ""
    """Digest of the files of that version."""
    metrics: tuple[str, ...] = ()
    """Additional metrics, functions of your own, as MODULE:FUNCTION."""
    primary_metric: str = ""
    """The metric that selects the best checkpoint and the best trial, stops a training early and
    decides a promotion: one of the task's, or of `metrics`. By default the task's primary one."""
    primary_direction: Literal["", "max", "min"] = ""
    """Whether higher (`max`) or lower (`min`) values of `primary_metric` are better; by default as
    its function declares."""
    model: dict[str, Any] = {}
    """Settings of the network: the family's dataclass."""
    augment: dict[str, Any] = {}
    """Settings of the augmentation: the task's dataclass."""
    data: Data = Data()
    optim: dict[str, Optim] = {}
    """An optimizer for each part of the network."""
    schedule: Schedule = Schedule()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    workers: Workers = Workers()
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Random seed of weights, order and augmentation."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Fills in the defaults of family and variant, so that the tree has every value in effect.
        Settings of family, variant and recipe override each other in this order."""
        if not isinstance(values, Mapping) or not isinstance(values.get("family"), str):
            return values  # pydantic reports it
        family = models.get(values["family"])
        variant = values.get("variant", "base")
        if variant not in family.variants:
            raise unknown(f"variant of {family.name}", str(variant), family.variants)
        tree: dict[str, Any] = {
            "model": dataclasses.asdict(family.variants[variant]),
            "augment": dataclasses.asdict(family.task.augment_settings()),
            "optim": {},
        }
        for path, value in {**family.defaults, **family.variant_defaults.get(variant, {})}.items():
            _put(tree, path, value)
        tree["optim"] = tree["optim"] or {"model": {}}
        _merge(tree, values)
        kinds = {
            "model": type(family.variants[variant]),
            "augment": family.task.augment_settings,
        }
        typed = {where: _typed(where, kind, tree[where]) for where, kind in kinds.items()}
        family.check(typed["model"], typed["augment"])
        for where, settings in typed.items():  # the same form from code (tuples) and JSON (lists)
            tree[where] = dataclasses.asdict(settings)
        return tree

    @model_validator(mode="after")
    def _check_loss(self) -> Recipe:
        family, train = models.get(self.family), self.train
        if train.loss != "cross_entropy" and train.loss not in family.losses:
            raise UsageError(
                f"train.loss = {train.loss} is not for {self.family}, which has its own loss",
                hint="leave train.loss out",
            )
        if train.class_weights != "none" and not family.weighs_classes:
            raise UsageError(
                f"train.class_weights = {train.class_weights} is not for {self.family}, whose loss "
                "takes no weights",
                hint="leave train.class_weights out",
            )
        return self

    @model_validator(mode="after")
    def _check_data(self) -> Recipe:
        task = models.get(self.family).task
        if self.data.sampler != "shuffle" and task.reads != "classification":
            raise UsageError(
                f"data.sampler = {self.data.sampler} is not for {task.name}, whose images have no "
                "class",
                hint="leave data.sampler out",
            )
        if self.data.fit == "resize_crop" and task.has_positions:
            raise UsageError(
                f"data.fit = resize_crop is not for {task.name}, as it cuts off the edges",
                hint="give stretch, crop or pad",
            )
        return self

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        custom_metrics.check_names(names)
        return names

    def primary(self) -> Metric:
        """The metric that selects the best checkpoint. Raises UsageError if there is none of this
        name, or if it is not known whether higher or lower values are better."""
        task = models.get(self.family).task
        return custom_metrics.choose_primary(
            task, self.metrics, self.primary_metric, self.primary_direction
        )

    def config(self) -> Any:
        """The network's settings as the family's dataclass."""
        return _typed("model", type(models.get(self.family).variants[self.variant]), self.model)

    def augment_settings(self) -> Any:
        """The augmentation's settings as the task's dataclass."""
        return _typed("augment", models.get(self.family).task.augment_settings, self.augment)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """The recipe with new values at dotted paths; `*` matches any name: `optim.*.lr`.

        Raises UsageError for an unknown path, with the nearest known one.
        """
        tree = self.model_dump(mode="json")
        known = dict(leaves(tree))
        for pattern, value in overrides.items():
            paths = [path for path in known if fnmatchcase(path, pattern)]
            if not paths:
                see = f"tessera describe {self.family}"
                raise unknown("setting", pattern, known, see=see)
            for path in paths:
                _put(tree, path, value)
        if overrides.keys() & {"family", "variant"}:
            for key in ("model", "augment", "optim"):
                del tree[key]
        return build(tree)

    def flat(self) -> dict[str, str]:
        """Dotted path -> value as text, for MLflow's params."""
        return {path: _text(value) for path, value in leaves(self.model_dump(mode="json"))}

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def build(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data. Raises UsageError that names the wrong setting."""
    if "family" not in tree:
        raise UsageError("the recipe names no family", hint="add a line: family: cnn")
    for name in tree.keys() & _SECTIONS:
        if not isinstance(tree[name], Mapping):
            raise UsageError(
                f"{name} = {settings_file.short(tree[name])}: it must be a mapping of settings",
                hint=f"write its settings below a line `{name}:`, or leave it out",
            )
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        raise _explain(error) from None


_SECTIONS = {
    name
    for name, field in Recipe.model_fields.items()
    if isinstance(field.default, Frozen | dict) or field.annotation is dict
}
"""The parts of a recipe that are mappings."""


def start(family: str, variant: str | None = None) -> Recipe:
    """A family's default recipe."""
    return build({"family": family, **({"variant": variant} if variant else {})})


def read(path: Path) -> Recipe:
    """A recipe from a YAML or JSON file. Raises UsageError if it isn't one."""
    return build(settings_file.read(path, "recipe", example="family: cnn"))


FREE_TO_CHANGE = (
    "metrics",
    "workers.",
    "checkpoint.",
    "data.path",
    "data.loader_workers",
    "data.cache",
    "data.sample_log",
    "train.log_every_steps",
)
"""Prefixes of the paths that may differ when a training is resumed."""


def differences(before: Recipe, now: Recipe, changing: Sequence[str] = ()) -> list[str]:
    """The settings that differ although a resumed training must keep them, with both values.
    `changing` are paths that this training may change, as a population member does."""
    old, new = before.flat(), now.flat()
    return [
        f"{path} was {old.get(path)}, is {new.get(path)}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
        and not path.startswith(FREE_TO_CHANGE)
        and path not in changing
    ]


def check_resumable(before: Recipe, now: Recipe, changing: Sequence[str] = ()) -> None:
    """Raises UsageError that lists the `differences`, if there are any."""
    changed = differences(before, now, changing)
    if changed:
        raise UsageError(
            f"a training can't be resumed with other settings: {'; '.join(changed)}",
            hint="resume without them, or start a new training",
        )


def parse_override(text: str) -> tuple[str, Any]:
    """Splits `path=value` from a command line; the value is YAML (`0.3`, `true`, `[1, 2]`)."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UsageError(
            f"--set {text} has no value", hint="write it as PATH=VALUE, as in optim.model.lr=0.1"
        )
    try:
        parsed = settings_file.parse(value, f"--set {path}")
    except UsageError:
        parsed = value
    if isinstance(parsed, str):  # YAML 1.1 reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    return path.strip(), parsed


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, value) of each leaf; an empty mapping is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _merge(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _typed(where: str, kind: type[Any], values: Mapping[str, Any]) -> Any:
    fields = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in fields:
            raise unknown(f"setting under {where!r}:", key, fields)
    try:
        return _adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise _explain(error, where) from None


_adapters: dict[type[Any], TypeAdapter[Any]] = {}
"""Making one takes a millisecond, and every recipe needs two, again and again."""


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def _explain(error: ValidationError, where: str = "") -> UsageError:
    """The first error that pydantic reports, with the nearest names for an unknown setting."""
    first = error.errors(include_url=False)[0]
    setting = ".".join([where] * bool(where) + [str(p) for p in first["loc"]])
    if first["type"] == "extra_forbidden":
        model: type[BaseModel] = Recipe
        for key in first["loc"][:-1]:
            kind = model.model_fields[key].annotation if key in model.model_fields else Optim
            model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else model
        siblings = setting.split(".")[:-1]
        known = [".".join([*siblings, name]) for name in model.model_fields]
        return unknown("recipe key", setting, known)
    value = settings_file.short(first["input"])
    return UsageError(f"{setting} = {value}: {value_problem(first['msg'])}")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
