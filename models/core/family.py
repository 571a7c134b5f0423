"""The contract: a Task says what is asked, a Family says how it is answered.

Knows nothing of files, network, cluster or tracking.

    B images, C channels, H height, W width, K classes
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from models.core.spaces import Space

Batch = dict[str, Any]
"""`image` (B, C, H, W), uint8 from the loader and float from a transform on; `key`, a list of B
names; the task's own fields, with B rows each."""
Losses = dict[str, Tensor]
"""`loss` is the mean over the batch's images and is minimised; the others are only logged."""
Prediction = dict[str, Any]
"""The answer for one image; its fields are the task's."""
Defaults = Mapping[str, Any]
"""Dotted paths of the recipe and their values."""
C = TypeVar("C")


@dataclass(frozen=True)
class DataSpec:
    """What a network has to know of the data. `mean` and `std` are of pixels scaled to 0..1."""

    task: str
    channels: int
    height: int
    width: int
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.height, self.width)


@dataclass
class Draws:
    """Random numbers for the rows of one global batch.

    The numbers are drawn for the whole global batch and this rank's rows are cut out of them, so
    what happens to a sample depends on seed, epoch and step, not on the number of ranks.
    """

    seed: int
    total: int
    rows: slice
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) in [0, 1), on the CPU."""
        return torch.rand((self.total, *shape), generator=self._generator)[self.rows]

    def integers(self, high: int, *shape: int) -> Tensor:
        """(B, *shape) of int64 in [0, high)."""
        drawn = torch.randint(high, (self.total, *shape), generator=self._generator)
        return drawn[self.rows]


Transform = Callable[[Batch, Draws], Batch]
"""Takes a batch of uint8 images on the device and gives the batch that the network sees."""


@dataclass(frozen=True)
class Figure:
    """A figure of merit: its name, and which way is better."""

    name: str
    direction: Literal["max", "min"]

    def better(self, value: float, than: float) -> bool:
        return value > than if self.direction == "max" else value < than


class Task(ABC):
    """What is asked: the sample's fields, the figures, the default augmentation, the rendering."""

    name: ClassVar[str]
    primary: ClassVar[Figure]
    augment_settings: ClassVar[type[Any]]
    """A frozen dataclass; the recipe's `augment` holds its fields."""

    @abstractmethod
    def targets(self, batch: Batch) -> list[dict[str, Any]]:
        """One small dict an image: the truth that `figures` compares a prediction with."""

    @abstractmethod
    def augment(self, settings: Any, data: DataSpec, *, train: bool) -> Transform:
        """The transform on a whole batch, on the device. Ends with normalised float images."""

    @abstractmethod
    def figures(
        self,
        predictions: Sequence[Prediction],
        targets: Sequence[Mapping[str, Any]],
        data: DataSpec,
    ) -> dict[str, float]:
        """Figures over all images, given in the data set's order: exact, whoever predicted them."""

    def confusion(
        self,
        predictions: Sequence[Prediction],
        targets: Sequence[Mapping[str, Any]],
        data: DataSpec,
    ) -> Tensor | None:
        """(K, K) int64 counts, row the truth, column the answer; None where there are no classes
        to confuse."""
        return None

    @abstractmethod
    def badness(self, prediction: Prediction, target: Mapping[str, Any]) -> float:
        """How wrong an answer is; the largest are shown as the worst mistakes."""

    @abstractmethod
    def answer(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """A prediction as plain JSON with class names."""

    @abstractmethod
    def caption(
        self, prediction: Prediction | None, target: Mapping[str, Any] | None, data: DataSpec
    ) -> str:
        """A line to write under the picture."""


class Family(ABC, Generic[C]):
    """How it is answered. A stateless object; the network stays a plain `nn.Module`."""

    name: str = ""
    """The file's name; `models.get` sets it."""
    task: ClassVar[Task]
    variants: ClassVar[Mapping[str, Any]]
    """Name -> config, a frozen dataclass. "tiny" is obligatory, "base" is the default."""
    defaults: ClassVar[Defaults] = {}
    """The settings this family is known to work with."""
    variant_defaults: ClassVar[Mapping[str, Defaults]] = {}
    """What a variant needs otherwise than the family."""

    @abstractmethod
    def build(self, config: C, data: DataSpec) -> nn.Module:
        """A fresh network. Its weights depend on torch's seed alone."""

    def warm_start(self, config: C, module: nn.Module) -> None:
        """Loads the pretrained weights that the config names, if any. Called once, on every rank,
        when a training begins; not when one goes on, nor when a trained model is loaded."""
        return

    @abstractmethod
    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """The losses of a transformed batch."""

    @abstractmethod
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        """One prediction an image, for a transformed batch, in evaluation mode."""

    def augment(self, settings: Any, data: DataSpec, *, train: bool) -> Transform:
        return self.task.augment(settings, data, train=train)

    def search_space(self) -> Mapping[str, Space]:
        return {}

    def parts(self, module: nn.Module) -> Mapping[str, nn.Module]:
        """The parts that have an optimizer each; `optim.PART` in the recipe."""
        return {"model": module}

    def updates(self, parts: Mapping[str, nn.Module], batch: Batch) -> Iterator[tuple[str, Losses]]:
        """Yields (part, losses) once for each optimizer update; the loop applies it in between."""
        yield "model", self.loss(parts["model"], batch)

    def frozen(self, config: C, module: nn.Module, epoch: int) -> frozenset[str]:
        """Names of the parameters that are not trained in this epoch."""
        return frozenset()

    def servable(self, module: nn.Module, data: DataSpec) -> nn.Module | None:
        """A module from uint8 images (B, H, W, C) to the answer, with the preprocessing in it,
        for readers that have no Tessera; None where there is no such tensor."""
        return None
