"""The contract: a Task is what a network is trained for, a Family is a network that does it.

Knows nothing of files, network, cluster or tracking.

    B images, C channels, H height, W width, K classes
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from models.core.errors import UsageError
from models.core.fitted import DataFacts, Fitted
from models.core.losses import LossSettings
from models.core.spaces import Space

Batch = dict[str, Any]
"""`image` (B, C, H, W), uint8 from the loader and float after a transform; `key`, a list of B
names; `index` (B,), positions in the split; `size` (B, 2), height and width of the stored images;
`extent` (B, 2), height and width of `image` without its padding on the right and below; and the
task's own fields, with B rows each. A field whose length differs by image is a list of B
tensors."""
Losses = dict[str, Tensor]
"""`loss`, the mean over the images of the batch, is minimised; the others are only logged."""
Prediction = dict[str, Any]
"""The prediction for one image. The task defines its fields. Tensors are on the CPU."""
Target = dict[str, Any]
"""The ground truth of one image. The task defines its fields. Tensors are on the CPU."""
Record = dict[str, Any]
"""What the metrics need of one image: prediction and truth, compared. Records are sent between
processes, so they are small: numbers, strings, bytes, short tensors on the CPU."""
Judge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A trained classifier: images uint8 (B, C, H, W) -> features (B, D), probabilities (B, K)."""
Defaults = Mapping[str, Any]
"""Dotted path of the recipe -> value."""
C = TypeVar("C")


@dataclass(frozen=True)
class DataSpec:
    """What a network needs to know of the data. `task` is the annotation that is read
    (`Task.reads`). `mean` and `std` are of pixels scaled to 0..1. `counts` are the images, objects
    or pixels of each class in the training split; empty if there are no classes."""

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

    The numbers are drawn for the whole global batch, and each rank takes its rows of them. So the
    augmentation of a sample depends on seed, epoch and step, not on the number of ranks.
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
"""From a batch of uint8 images on the device to the batch that the network sees."""


@dataclass(frozen=True)
class RandomCrop:
    """A random part of a training image, cut out before the image is resized: Szegedy et al., Going
    Deeper with Convolutions, 2014, as torchvision's `RandomResizedCrop`.

    `scale` are the smallest and the largest share of the image's area, `ratio` of width to height.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(
                f"augment.crop_scale = {list(self.scale)}",
                hint="give the smallest and the largest share of the area, above 0 and up to 1",
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise UsageError(
                f"augment.crop_ratio = {list(self.ratio)}",
                hint="give the smallest and the largest ratio of width to height, above 0",
            )


@dataclass(frozen=True)
class Metric:
    """The name of a metric, and whether larger or smaller is better."""

    name: str
    direction: Literal["max", "min"]

    def better(self, value: float, than: float) -> bool:
        return value > than if self.direction == "max" else value < than


@dataclass(frozen=True)
class View:
    """How an image of `size` was placed into the network's input of size `frame`: its pixel (y, x)
    is at (y * scale[0] + shift[0], x * scale[1] + shift[1]). Sizes are (height, width)."""

    size: tuple[int, int]
    frame: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Panel:
    """An image to be drawn with annotations or predictions. The drawing code chooses the colours.

    image   uint8 (C, H, W), on the CPU
    boxes   float (N, 4): left, top, right, bottom in its pixels; with `labels` (N,), and `scores`
            (N,) if they are predictions
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
    """A line chart: name -> (x, y) values, all in 0..1. With `diagonal`, a line for y = x."""

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    diagonal: bool = False


class Task(ABC):
    """What a network is trained for: annotations, augmentation, records, metrics, rendering.

    A stateless object. A task can also be defined outside the project, beside its family.
    """

    name: ClassVar[str]
    """Lower case with underscores."""
    reads: ClassVar[str]
    """The annotations that are read, the kind of a data set (`card.ANNOTATION_EXTENSIONS`). Any
    data set can be read as "images", and one with instance masks as "detection"."""
    has_positions: ClassVar[bool] = True
    """Whether annotations or predictions have positions in the image."""
    primary: ClassVar[Metric]
    """The metric that selects the best checkpoint."""
    extra_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics shown beside the primary one where there is no room for all."""
    augment_settings: ClassVar[type[Any]]
    """A frozen dataclass: the settings under the recipe's `augment`."""
    eval_batch: ClassVar[int] = 256
    """Batch size of evaluations. Fixed, so that metrics don't depend on the hardware."""
    needs_judge: ClassVar[bool] = False
    """Whether the metrics need a `Judge`, which is then applied to each batch of an evaluation."""
    knows_classes: ClassVar[bool] = True
    """Whether predictions are limited to the classes of the training data."""
    writes_coco_results: ClassVar[bool] = False
    """Whether predictions are objects that can be written as COCO results."""
    takes_images: ClassVar[bool] = True
    """Whether a prediction belongs to an input image; False for generators."""
    bootstrap_samples: ClassVar[int] = 1000
    """Resamples of the images for confidence intervals."""
    resample_with_replacement: ClassVar[bool] = True
    """Whether an image can occur twice in a resample; False if images are compared with each
    other."""
    output_name: ClassVar[str] = ""
    """Name of the tensor that exported networks return. A prediction's field of that name has the
    same values."""

    @property
    def headline_metrics(self) -> tuple[str, ...]:
        """The primary metric and the extra ones."""
        return (self.primary.name, *self.extra_metrics)

    @abstractmethod
    def targets(self, batch: Batch) -> list[Target]:
        """The ground truth of each image. `batch` is from the loader, or transformed."""

    @abstractmethod
    def augment(self, settings: Any, data: DataSpec, *, train: bool) -> Transform:
        """The transform of a batch with its annotations, on the device. It ends with normalised
        float images. Without `train`, it applies only what belongs to an evaluation."""

    def crop(self, settings: Any) -> RandomCrop | None:
        """What is cut out of each training image before it is resized; None for the whole image,
        which `data.fit` brings to size. Only for tasks without `has_positions`."""
        return None

    def prepare(self, settings: Any, data: DataSpec) -> Transform:
        """The transform of images without annotations, for predictions."""
        return self.augment(settings, data, train=False)

    def apply_judge(
        self, judge: Judge, predictions: Sequence[Prediction], targets: Sequence[Target]
    ) -> None:
        """Adds the judge's features and classes to a batch's predictions and targets."""
        return

    @abstractmethod
    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """What `metrics` needs of one image. Called on the rank that predicted it."""

    @abstractmethod
    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """Metrics of all images. Records are in the data set's order, whichever rank predicted
        them."""

    def bootstrap_metrics(
        self, records: Sequence[Record], data: DataSpec
    ) -> Callable[[Sequence[int]], dict[str, float]]:
        """A function from positions in `records`, also repeated ones, to the metrics of these
        images.

        It may add metrics by class, `METRIC/CLASS`. It is called for every resample of a bootstrap;
        a task overrides this if it can share work between them.
        """
        return lambda positions: self.metrics([records[i] for i in positions], data)

    def confusion(self, records: Sequence[Record], data: DataSpec) -> Tensor | None:
        """The confusion matrix (K, K), int64: rows are true classes, columns predicted ones. None
        for tasks without classes."""
        return None

    def charts(self, records: Sequence[Record], data: DataSpec) -> list[Chart]:
        """Charts of all images for the report, like precision and recall."""
        return []

    @abstractmethod
    def error_score(self, record: Record) -> float:
        """How wrong a prediction is. Those with the largest scores are shown as worst mistakes."""

    def to_original_size(self, prediction: Prediction, view: View) -> Prediction:
        """A prediction at the network's input size, converted to the image's own size."""
        return prediction

    @abstractmethod
    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """The prediction as plain JSON, with class names."""

    @abstractmethod
    def panels(
        self,
        image: Tensor,
        prediction: Prediction | None,
        target: Target | None,
        data: DataSpec,
    ) -> list[Panel]:
        """Panels to draw side by side. `image` is uint8 (C, H, W) without padding; `prediction` and
        `target` are at its size."""

    def sample_panels(self, batch: Batch, data: DataSpec) -> list[list[Panel]]:
        """Panels for the images of a transformed training batch, as the network sees them."""
        mean = torch.tensor(data.mean)[:, None, None]
        std = torch.tensor(data.std)[:, None, None]
        images = batch["image"].detach().float().cpu() * std + mean
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        return [self.panels(i, None, t, data) for i, t in zip(pixels, self.targets(batch))]

    def related_images(self, records: Sequence[Record], position: int) -> list[tuple[int, str]]:
        """Positions of other images to show beside one, the most similar first, each with a
        caption."""
        return []

    def prediction_to_image(self, prediction: Prediction) -> Tensor | None:
        """The prediction as an image: uint8 (C, H, W) with colours, or (H, W) with the class of
        each pixel. None if it is not an image."""
        return None

    def prediction_to_coco(self, prediction: Prediction) -> list[dict[str, Any]]:
        """The predicted objects as COCO results without `image_id`. `category_id` counts from 1."""
        return []


class Family(ABC, Generic[C]):
    """A network with its settings, loss and predictions. A stateless object; the network itself is
    a plain `nn.Module`."""

    name: str = ""
    """The name of its file, or of its module outside the project. `models.get` sets it."""
    task: ClassVar[Task]
    variants: ClassVar[Mapping[str, Any]]
    """Name -> config, a frozen dataclass. There must be "tiny", for tests, and "base", the
    default."""
    defaults: ClassVar[Defaults] = {}
    """Settings of the recipe that are known to work with this family."""
    losses: ClassVar[Sequence[str]] = ()
    """The kinds of `train.loss` that the family can train with; empty for one with losses of its
    own."""
    weighs_classes: ClassVar[bool] = False
    """Whether the family's losses follow `train.class_weights`."""
    loss_settings: LossSettings | None = None
    """Kind and class weights that `loss` follows; None for the cross-entropy."""
    accepts_any_size: ClassVar[bool] = False
    """Whether the network takes images of any size, not only of the size that it was built for."""
    variant_defaults: ClassVar[Mapping[str, Defaults]] = {}
    """Variant -> settings that differ from `defaults`."""

    @abstractmethod
    def build(self, config: C, data: DataSpec) -> nn.Module:
        """A new network. Its weights depend only on torch's seed."""

    def check(self, config: C, augment: Any) -> None:
        """Raises UsageError if the settings of network and augmentation don't fit each other.
        Called for every recipe."""
        return

    def warm_start(self, config: C, module: nn.Module) -> None:
        """Loads the pretrained weights that the config names, if any. Called on every rank when a
        training begins; not when one is resumed, nor when a trained model is loaded."""
        return

    def with_loss(self, settings: LossSettings) -> Family[C]:
        """The same family, whose losses follow these settings."""
        family = copy.copy(self)
        family.loss_settings = settings
        return family

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """The losses of a transformed batch. A family with several parts overrides `updates`
        instead."""
        raise NotImplementedError(f"{type(self).__name__} has neither loss nor updates")

    @abstractmethod
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        """A prediction for each image of a transformed batch. The module is in evaluation mode."""

    def augment(self, settings: Any, data: DataSpec, *, train: bool) -> Transform:
        """The task's transform, or one of the family's own."""
        return self.task.augment(settings, data, train=train)

    def search_space(self) -> Mapping[str, Space]:
        """Dotted path of the recipe -> the values that a search tries by default."""
        return {}

    def fitted_defaults(
        self, config: C, facts: DataFacts, settings: Mapping[str, Any], kept: Container[str]
    ) -> Iterable[Fitted]:
        """Settings that fit a data set better than `settings`, the recipe's by dotted path. Used
        where a training begins with the family's name.

        Those in `kept` stay as they are, whatever is returned: the user's, and the variant's. A
        path that the recipe doesn't have is passed over.
        """
        return ()

    def parts(self, module: nn.Module) -> Mapping[str, nn.Module]:
        """The parts with an optimizer each, set by `optim.PART` in the recipe."""
        return {"model": module}

    def updates(self, parts: Mapping[str, nn.Module], batch: Batch) -> Iterator[tuple[str, Losses]]:
        """Yields (part, losses) for each optimizer update. The loop applies it before asking for
        the next, so later losses see updated weights."""
        yield "model", self.loss(parts["model"], batch)

    def decode(self, module: nn.Module, codes: Tensor) -> list[Prediction]:
        """Predictions decoded from codes (B, D). Raises UsageError if the family has no codes."""
        raise UsageError(f"{self.name} has no codes to decode", hint="use an autoencoder")

    def frozen(self, config: C, module: nn.Module, epoch: int) -> frozenset[str]:
        """Names of the parameters that this epoch doesn't train."""
        return frozenset()

    def exportable(self, module: nn.Module, data: DataSpec) -> nn.Module | None:
        """A module from uint8 images (B, H, W, C) to one output tensor, with the preprocessing, for
        programs without Tessera. None if the output is not one tensor."""
        return None
