"""Identification and comparison with a tiny trained network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import BatchRng, DataSpec
from pipelines import recipe as recipes
from pipelines.inference.identify import PairSimilarity, build_gallery
from pipelines.inference.predictor import Predictor
from pipelines.interfaces import Version
from pipelines.workflows.predict import PredictionOptions, TrainedModel

COLOURS = {"green": (30, 200, 40), "lilac": (190, 120, 220), "rusty": (170, 80, 20)}
SPEC = DataSpec(
    "classification", 3, 12, 12, ("red", "blue", "grey"), (0.4, 0.4, 0.4), (0.3, 0.3, 0.3)
)
RECIPE = recipes.start("embedding", "tiny")
TRAINED = torch.tensor([[220, 30, 30], [30, 40, 220], [128, 128, 128]])


def noisy(colours: torch.Tensor, seed: int) -> torch.Tensor:
    """uint8 (B, 3, 12, 12) of the colours (B, 3)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-25, 26, (len(colours), 3, 12, 12), generator=generator)
    return (colours[:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Trained on three colours, used for three others."""
    family = models.get("embedding")
    torch.manual_seed(0)
    module = family.build(RECIPE.config(), SPEC).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    transform = family.augment(RECIPE.augment_settings(), SPEC, train=True)
    labels = torch.arange(24) % 3
    for step in range(30):
        batch = {"image": noisy(TRAINED[labels], step), "label": labels, "key": [""] * 24}
        seen = transform(batch, BatchRng(step, 24, slice(0, 24)))
        family.loss(module, seen)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return Predictor(RECIPE, SPEC, module.state_dict())


def paint(path: Path, colour: str, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noisy(torch.tensor([COLOURS[colour]]), seed)[0].permute(1, 2, 0)
    Image.fromarray(pixels.contiguous().numpy()).save(path)
    return path


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    for name in COLOURS:
        for seed in range(3):
            paint(tmp_path / "gallery" / name / f"{seed}.png", name, seed)
    return tmp_path / "gallery"


def version(**metrics: float) -> Version:
    tags = {"tessera.metrics": json.dumps({f"val/{k}": v for k, v in metrics.items()})}
    return Version("colours", 1, "", tags)


def test_the_nearest_name_is_predicted(predictor: Predictor, gallery: Path, tmp_path: Path) -> None:
    identify = build_gallery(predictor, gallery, 0.5)
    for seed, name in enumerate(COLOURS):
        (result,) = predictor.predict([paint(tmp_path / "new.png", name, 50 + seed)])
        output = identify(result.prediction)
        assert json.loads(json.dumps(output)) == output
        assert output["class"] == name
        assert 0.5 < output["similarity"] <= 1.00001
        assert output["known"] is True
        assert output["top5"][0]["class"] == name
        similar = [one["similarity"] for one in output["top5"]]
        assert similar == sorted(similar, reverse=True)
        assert len(similar) == 3


def test_a_prototype_is_the_normalised_mean(predictor: Predictor, gallery: Path) -> None:
    paths = sorted((gallery / "lilac").iterdir())
    embeddings = torch.stack([f.prediction["embedding"] for f in predictor.predict(paths)])
    mean = torch.nn.functional.normalize(embeddings.mean(0), dim=0)
    (result,) = predictor.predict(paths[:1])
    output = {
        o["class"]: o for o in build_gallery(predictor, gallery, None)(result.prediction)["top5"]
    }
    expected = float(mean @ embeddings[0])
    assert output["lilac"]["similarity"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("threshold", "known"), [(-1.0, True), (1.01, False), (None, None)])
def test_known_depends_on_the_threshold(
    predictor: Predictor, gallery: Path, threshold: float | None, known: bool | None
) -> None:
    (result,) = predictor.predict([gallery / "green" / "0.png"])
    output = build_gallery(predictor, gallery, threshold)(result.prediction)
    assert output.get("known") is known
    assert ("known" in output) == (threshold is not None)


def test_an_unusable_gallery_is_refused(
    predictor: Predictor, gallery: Path, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match="bare has no subfolders"):
        build_gallery(predictor, tmp_path / "bare", None)
    (gallery / "rusty" / "bad.png").write_bytes(b"no image")
    with pytest.raises(TesseraError, match=r"rusty/bad\.png"):
        build_gallery(predictor, gallery, None)
    (gallery / "empty").mkdir()
    with pytest.raises(TesseraError, match="empty has no images"):
        build_gallery(predictor, gallery, None)


def test_other_models_are_refused(gallery: Path) -> None:
    recipe = recipes.start("cnn", "tiny")
    weights = models.get("cnn").build(recipe.config(), SPEC).state_dict()
    classifier = Predictor(recipe, SPEC, weights)
    with pytest.raises(UsageError, match="is classification: it has no embeddings"):
        build_gallery(classifier, gallery, None)
    with pytest.raises(UsageError, match="is classification"):
        PairSimilarity(classifier, None)


def outputs(
    predictor: Predictor, version: Version, options: PredictionOptions
) -> list[dict[str, Any]]:
    return [result.to_dict() for result in TrainedModel(predictor, version).run(options)]


def test_predict_identifies_and_compares(
    predictor: Predictor, gallery: Path, tmp_path: Path
) -> None:
    paths = [paint(tmp_path / f"{n}.png", c, 70 + n) for n, c in enumerate(["rusty", "rusty"])]
    given = tuple(map(str, [paths[0], tmp_path / "absent.png", paths[1], paths[0]]))
    lines = outputs(predictor, version(threshold=0.9), PredictionOptions(given, gallery=gallery))
    assert [line.get("class") for line in lines] == ["rusty", None, "rusty", "rusty"]
    assert all("known" in line and len(line["embedding"]) == 16 for line in lines[::2])
    first, absent, other, again = outputs(
        predictor, version(threshold=0.999999), PredictionOptions(given, compare=True)
    )
    assert not {"similarity", "same"} & (first.keys() | absent.keys())
    assert "error" in absent
    assert again["similarity"] == pytest.approx(1, abs=1e-5)
    assert other["similarity"] == pytest.approx(
        sum(a * b for a, b in zip(first["embedding"], other["embedding"])), abs=1e-5
    )
    assert (again["same"], other["same"]) == (True, False)
    without_threshold = outputs(predictor, version(), PredictionOptions(given, compare=True))
    assert "similarity" in without_threshold[2]
    assert "same" not in without_threshold[2]
    with pytest.raises(TesseraError, match=r"absent\.png doesn't exist"):
        outputs(predictor, version(), PredictionOptions(given[1:], compare=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 3, "compare": True}, "--compare needs images"),
        ({"paths": ("a",), "compare": True, "gallery": Path()}, "don't go together"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PredictionOptions(**{"paths": (), **options})
