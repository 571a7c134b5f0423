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

from models.core.errors import UsageError
from models.core.spaces import Space

Batch = dict[str, Any]
"""`image` (B, C, H, W), uint8 from the loader and float from a transform on; `key`, a list of B
names; `index` (B,), numbers in the split; `size` (B, 2), height and width as stored; `extent`
(B, 2), how much of `image`, from its left upper corner, is picture; the task's own fields, with B
rows each. A field of another length an image is a list of B tensors."""
Losses = dict[str, Tensor]
"""`loss` is the mean over the batch's images and is minimised; the others are only logged."""
Prediction = dict[str, Any]
"""The answer for one image; its fields are the task's. Tensors are on the CPU."""
Target = dict[str, Any]
"""The truth of one image; its fields are the task's. Tensors are on the CPU."""
Record = dict[str, Any]
"""What figures need to know of one image: prediction and truth compared. It goes from process to
process, so it is small: numbers, texts, bytes, short tensors on the CPU."""
Judge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A trained classifier: images uint8 (B, C, H, W) -> features (B, D), probabilities (B, K)."""
Defaults = Mapping[str, Any]
"""Dotted paths of the recipe and their values."""
C = TypeVar("C")


@dataclass(frozen=True)
class DataSpec:
    """What a network has to know of the data. `task` is what is read of a sample (`Task.reads`).
    `mean` and `std` are of pixels scaled to 0..1; `counts` are images, objects or pixels of each
    class in the training split, empty where there are no classes."""

    task: str
    channels: int
    height: int
    width: int
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    counts: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.height, self.width)


@dataclass
class BatchRng:
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

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape), normally distributed, on the CPU."""
        return torch.randn((self.total, *shape), generator=self._generator)[self.rows]

    def integers(self, high: int, *shape: int) -> Tensor:
        """(B, *shape) of int64 in [0, high)."""
        drawn = torch.randint(high, (self.total, *shape), generator=self._generator)
        return drawn[self.rows]


Transform = Callable[[Batch, BatchRng], Batch]
"""Takes a batch of uint8 images on the device and gives the batch that the network sees."""


@dataclass(frozen=True)
class Metric:
    """A figure of merit: its name, and which way is better."""

    name: str
    direction: Literal["max", "min"]

    def better(self, value: float, than: float) -> bool:
        return value > than if self.direction == "max" else value < than


@dataclass(frozen=True)
class View:
    """How an image of `size` lies in what the network sees of it, `frame`: its pixel (y, x) is at
    (y * scale[0] + shift[0], x * scale[1] + shift[1]). Sizes are (height, width)."""

    size: tuple[int, int]
    frame: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Panel:
    """A picture to look at: an image and what is said of it. Whoever draws it knows the colours.

    image   uint8 (C, H, W), on the CPU
    boxes   float (N, 4): left, top, right, bottom in its pixels; with `labels` (N,), and `scores`
            (N,) where they are predicted
    crowd   bool (N,): which boxes are regions of many objects
    masks   uint8 (N, H, W) of 0 and 1: the pixels of the N objects
    mask    uint8 (H, W): the class of each pixel, 255 for none
    """

    image: Tensor
    caption: str = ""
    boxes: Tensor | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None
    masks: Tensor | None = None
    mask: Tensor | None = None
    crowd: Tensor | None = None


@dataclass(frozen=True)
class Chart:
    """Lines to be drawn: name -> (x, y), all within 0..1. `diagonal` is drawn where the best lies
    on it."""

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    diagonal: bool = False


class Task(ABC):
    """What is asked: the sample's fields, the figures, the default augmentation, the rendering."""

    name: ClassVar[str]
    reads: ClassVar[str]
    """What is read of a sample: a task of data sets (`card.ANNOTATION_EXTENSIONS`). Data of any task can
    be read as "images", and those with instances as "detection"."""
    primary: ClassVar[Metric]
    extra_metrics: ClassVar[tuple[str, ...]] = ()
    """Further figures to name beside the primary one, where there is no room for all."""
    augment_settings: ClassVar[type[Any]]
    """A frozen dataclass; the recipe's `augment` holds its fields."""
    eval_batch: ClassVar[int] = 256
    """Images in a batch of an evaluation. Fixed: figures must not depend on the hardware."""
    needs_judge: ClassVar[bool] = False
    """Whether figures need a `Judge`; it is then consulted for each batch of an evaluation."""
    knows_classes: ClassVar[bool] = True
    """Whether an answer is one of the classes that were trained on."""
    writes_coco_results: ClassVar[bool] = False
    """Whether answers are objects that can be written as COCO results."""
    takes_images: ClassVar[bool] = True
    """Whether an answer is about an image that is given."""
    bootstrap_samples: ClassVar[int] = 1000
    """How often figures are made of other draws of the images, for their intervals."""
    resample_with_replacement: ClassVar[bool] = True
    """Whether an image may be in such a draw twice; not where images are compared with each other."""
    output_name: ClassVar[str] = ""
    """What `Family.exportable` answers with, where it is one tensor; where a prediction has a field
    of that name, it is the same."""

    @property
    def headline_metrics(self) -> tuple[str, ...]:
        return (self.primary.name, *self.extra_metrics)

    @abstractmethod
    def targets(self, batch: Batch) -> list[Target]:
        """One an image: the truth that a prediction is compared with. `batch` is as the loader
        gave it, or transformed."""

    @abstractmethod
    def augment(self, settings: Any, data: DataSpec, *, train: bool) -> Transform:
        """The transform on a whole batch of images with their truths, on the device. Ends with
        normalised float images."""

    def prepare(self, settings: Any, data: DataSpec) -> Transform:
        """The transform on images of which nothing is known, as they are given to be answered."""
        return self.augment(settings, data, train=False)

    def apply_judge(
        self, judge: Judge, predictions: Sequence[Prediction], targets: Sequence[Target]
    ) -> None:
        """Adds to a batch's predictions and targets what a classifier says of their images."""
        return

    @abstractmethod
    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """All that `metrics` has to know of an image. Made by the rank that predicted."""

    @abstractmethod
    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """Figures over all images, given in the data set's order: exact, whoever predicted them."""

    def bootstrap_metrics(
        self, records: Sequence[Record], data: DataSpec
    ) -> Callable[[Sequence[int]], dict[str, float]]:
        """Makes figures of any of the images, named by their places in `records`, each counted as
        often as it is named. They are `metrics` of these records and, where the task knows classes,
        those of each class, `FIGURE/CLASS`; a task overrides it where they can be made quicker than
        from the records."""
        return lambda places: self.metrics([records[place] for place in places], data)

    def confusion(self, records: Sequence[Record], data: DataSpec) -> Tensor | None:
        """(K, K) int64 counts, row the truth, column the answer; None where there are no classes
        to confuse."""
        return None

    def charts(self, records: Sequence[Record], data: DataSpec) -> list[Chart]:
        """What a figure alone doesn't show, of all images."""
        return []

    @abstractmethod
    def error_score(self, record: Record) -> float:
        """How wrong an answer is; the largest are shown as the worst mistakes."""

    def to_original_size(self, prediction: Prediction, view: View) -> Prediction:
        """The prediction for what the network saw, as one for the image itself."""
        return prediction

    @abstractmethod
    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """A prediction as plain JSON with class names."""

    @abstractmethod
    def panels(
        self,
        image: Tensor,
        prediction: Prediction | None,
        target: Target | None,
        data: DataSpec,
    ) -> list[Panel]:
        """What to look at, side by side. `image` is uint8 (C, H, W), all of it picture; prediction
        and target, where they are given, fit it."""

    def sample_panels(self, batch: Batch, data: DataSpec) -> list[list[Panel]]:
        """The images of a transformed training batch, as the network sees them."""
        mean = torch.tensor(data.mean)[:, None, None]
        std = torch.tensor(data.std)[:, None, None]
        images = batch["image"].detach().float().cpu() * std + mean
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        return [self.panels(i, None, t, data) for i, t in zip(pixels, self.targets(batch))]

    def related_images(self, records: Sequence[Record], position: int) -> list[tuple[int, str]]:
        """Positions of other images to show beside one, the nearest first, with a caption each."""
        return []

    def prediction_to_image(self, prediction: Prediction) -> Tensor | None:
        """The answer as an image file: uint8 (C, H, W) colours, or (H, W) classes of pixels; None
        where it is no image."""
        return None

    def prediction_to_coco(self, prediction: Prediction) -> list[dict[str, Any]]:
        """The objects of the answer as COCO results, but for `image_id`; `category_id` counts the
        classes from 1."""
        return []


class Family(ABC, Generic[C]):
    """How it is answered. A stateless object; the network stays a plain `nn.Module`."""

    name: str = ""
    """The file's name; `models.get` sets it."""
    task: ClassVar[Task]
    variants: ClassVar[Mapping[str, Any]]
    """Name -> config, a frozen dataclass. "tiny" is obligatory, "base" is the default."""
    defaults: ClassVar[Defaults] = {}
    """The settings this family is known to work with."""
    accepts_any_size: ClassVar[bool] = False
    """Whether the network takes images of any size; else of the one that it was built for."""
    variant_defaults: ClassVar[Mapping[str, Defaults]] = {}
    """What a variant needs otherwise than the family."""

    @abstractmethod
    def build(self, config: C, data: DataSpec) -> nn.Module:
        """A fresh network. Its weights depend on torch's seed alone."""

    def check(self, config: C, augment: Any) -> None:
        """Raises a UsageError where the settings of network and augmentation don't go together.
        Called for every recipe."""
        return

    def warm_start(self, config: C, module: nn.Module) -> None:
        """Loads the pretrained weights that the config names, if any. Called once, on every rank,
        when a training begins; not when one goes on, nor when a trained model is loaded."""
        return

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """The losses of a transformed batch. A family of several parts has `updates` instead."""
        raise NotImplementedError(f"{type(self).__name__} has neither loss nor updates")

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

    def decode(self, module: nn.Module, codes: Tensor) -> list[Prediction]:
        """What codes (B, D) stand for, for a network that encodes; a UsageError for any other."""
        raise UsageError(f"a {self.name} makes no codes", hint="an autoencoder does")

    def frozen(self, config: C, module: nn.Module, epoch: int) -> frozenset[str]:
        """Names of the parameters that are not trained in this epoch."""
        return frozenset()

    def exportable(self, module: nn.Module, data: DataSpec) -> nn.Module | None:
        """A module from uint8 images (B, H, W, C) to the answer, with the preprocessing in it,
        for readers that have no Tessera; None where there is no such tensor."""
        return None
