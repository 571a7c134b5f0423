"""The sections of a recipe: data, optimizer, schedule, training loop, checkpoints and workers.

In: plain values. Out: frozen settings with a type, a default and a meaning each, from which the
page of all settings is generated. Must not know families, nor any service.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Data(Frozen):
    """The packed data set, and how its images reach the network."""

    path: str = ""
    """The packed data set: a folder or an address."""
    digest: str = ""
    """Digest of the data set. Filled in when it is opened; another data set is refused."""
    height: int | None = Field(default=None, ge=1)
    """Height in pixels of the network's input; by default that of the largest image."""
    width: int | None = Field(default=None, ge=1)
    """Width in pixels of the network's input; by default that of the largest image."""
    fit: Literal["stretch", "crop", "pad", "resize_crop"] = "stretch"
    """How an image of another size is brought to this size: `stretch` scales both sides, `crop`
    cuts out the center at the image's own resolution, `resize_crop` scales the image so that it is
    8/7 as large as needed and cuts out the center, `pad` keeps the aspect ratio, shrinks the image
    if it is too large and pads the rest."""
    sampler: Literal["shuffle", "balanced", "sqrt"] = "shuffle"
    """Which training images an epoch has: `shuffle` has each one once. `balanced` has each class
    equally often, `sqrt` in proportion to the square root of its images; both repeat images of rare
    classes and leave out some of the others, which change with each epoch."""
    loader_workers: int = Field(default=0, ge=0)
    """Decoding processes of each worker; 0 decodes in a thread of the worker."""
    cache: Literal["auto", "none", "memory", "device"] = "auto"
    """Where decoded images are kept: in `memory`, shared by the workers of a machine, or on the
    `device`. `auto` chooses, and caches nothing that is larger than `cache_gib`."""
    cache_gib: float = Field(default=2.0, ge=0)
    """Largest size in GiB of the decoded images that are cached."""
    sample_log: bool = False
    """Log which samples each step used."""


class Optim(Frozen):
    """The optimizer of one part of the network. Norms and biases get no weight decay."""

    kind: Literal["sgd", "adam", "adamw"] = "adamw"
    """The optimizer."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov momentum of SGD."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay; norms and biases get none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of Adam and AdamW."""


class Schedule(Frozen):
    """The learning rate over the samples seen."""

    kind: Literal["constant", "cosine", "one_cycle", "step"] = "cosine"
    """Shape of the schedule after the warmup."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training in which the learning rate rises from 0."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end of `cosine` and `one_cycle`, as a share of the peak."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training after which `step` multiplies the learning rate by `gamma`."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """Factor of `step` at each milestone."""


class Train(Frozen):
    """The training loop."""

    epochs: int = Field(default=10, ge=1)
    """Passes over the training split."""
    batch_size: int = Field(default=128, ge=1)
    """Global batch size: the sum over all workers."""
    accumulate: int = Field(default=1, ge=1)
    """Gradient accumulation: number of parts that a batch is split into, to save memory."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the forward pass; `auto` is bf16 on hardware that supports it."""
    channels_last: bool = True
    """Use the channels-last memory format."""
    loss: Literal["cross_entropy", "focal", "bce"] = "cross_entropy"
    """Loss of classifiers: `focal` lets easy images count less, `bce` is the binary cross-entropy
    of each class."""
    class_weights: Literal["none", "sqrt", "balanced", "effective_number"] = "none"
    """How much the images of a class count in the loss, or its pixels: `balanced` is the inverse of
    their number in the training split, `sqrt` the square root of that, `effective_number` of Cui et
    al., 2019, lies between `none` and `balanced`."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Maximum norm of the gradient; 0 doesn't clip."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of an exponential moving average of the weights; 0 for none."""
    patience: int = Field(default=0, ge=0)
    """Epochs without a better validation metric before the training stops; 0 for never."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between logged training metrics."""


class Checkpoint(Frozen):
    """When checkpoints are written, and which are kept."""

    every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints within an epoch; 0 writes one after each epoch only."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept, besides the best."""


class Workers(Frozen):
    """The data-parallel workers."""

    count: int | str = 2
    """Number of workers; 0 trains in this process, without Ray. `2:8` is a group of 2 to 8 workers
    that grows and shrinks with the cluster."""
    cpus: int = Field(default=1, ge=1)
    """CPUs of each worker."""
    gpus: Literal["auto"] | int = "auto"
    """GPUs of each worker; `auto` is one if the cluster has enough of them."""
    max_failures: int = Field(default=3, ge=0)
    """How often the workers are restarted after one of them died, without a new checkpoint in
    between."""
    wait_seconds: float | None = Field(default=None, ge=0)
    """Seconds to wait for machines if the workers don't fit on the cluster; by default 600 on a
    cluster that was joined, and 0 on one that is started on this machine."""

    @field_validator("count", mode="before")
    @classmethod
    def _check_count(cls, value: Any) -> int | str:
        """A number, or the range MIN:MAX as text; also from a number as text or a pair."""
        numbers = value.split(":") if isinstance(value, str) else value
        numbers = numbers if isinstance(numbers, Sequence) else [numbers]
        try:
            low, high = int(numbers[0]), int(numbers[-1])
        except (TypeError, ValueError, IndexError):
            low, high = -1, -1
        is_range = len(numbers) == 2 and 1 <= low <= high
        if isinstance(value, bool | float) or not (is_range or (len(numbers) == 1 and low >= 0)):
            raise ValueError("use a number of workers, or a range from 1 such as 2:8")
        return low if low == high else f"{low}:{high}"

    @property
    def smallest(self) -> int:
        """The number of workers, or the smallest number of a range."""
        return int(str(self.count).partition(":")[0])

    @property
    def largest(self) -> int:
        """The number of workers, or the largest number of a range."""
        return int(str(self.count).rpartition(":")[2])
