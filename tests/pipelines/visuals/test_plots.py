"""Plots are readable image files of a sensible size with the requested content."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.core.errors import TesseraError
from models.core.family import Panel
from pipelines.visuals import draw, plots


def panels(images: torch.Tensor, captions: list[str]) -> list[list[Panel]]:
    if images.dtype != torch.uint8:
        images = (images * 255).round().to(torch.uint8)
    return [[Panel(image, caption)] for image, caption in zip(images, captions, strict=True)]


ODD = ["$x_1^{", "日本語", "a\nb\t\x07c", "", "<b>&amp;</b>", "w" * 200, "\\frac", "#%&"]


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("count", [1, 2, 8, 13, 24, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_image(tmp_path, count, channels):
    path = tmp_path / "made" / "grid.png"
    images = torch.full((count, channels, 6, 6), 0, dtype=torch.uint8)
    plots.grid(panels(images, [""] * count), (), path)
    dark = (pixels_of(path).sum(2) == 0).sum()
    plots.grid(panels(images[:1], [""]), (), tmp_path / "one.png")
    one = (pixels_of(tmp_path / "one.png").sum(2) == 0).sum()
    assert dark / count == pytest.approx(one, rel=0.25)


def test_grid_keeps_colours_and_range(tmp_path):
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1.0
    plots.grid(panels(red, ["red"]), (), tmp_path / "float.png")
    plots.grid(panels((red * 255).to(torch.uint8), ["red"]), (), tmp_path / "uint8.png")
    shown = pixels_of(tmp_path / "float.png")
    assert ((shown == [255, 0, 0]).all(2)).mean() > 0.4
    assert np.array_equal(shown, pixels_of(tmp_path / "uint8.png"))
    grey = torch.full((1, 1, 4, 4), 0.5)  # not stretched to black or white
    plots.grid(panels(grey, ["grey"]), (), tmp_path / "grey.png")
    assert ((abs(pixels_of(tmp_path / "grey.png") - 127) <= 1).all(2)).mean() > 0.4


@pytest.mark.parametrize("shape", [(20, 5, 50), (20, 50, 5), (4, 2000, 2000)])
def test_a_grid_of_unusual_shapes(tmp_path, shape):
    count, height, width = shape
    plots.grid(
        panels(torch.rand(count, 1, height, width), ["caption"] * count), (), tmp_path / "a.png"
    )
    side = pixels_of(tmp_path / "a.png").shape
    assert max(side) < 3000


def test_truth_and_prediction_are_drawn_side_by_side(tmp_path):
    """Boxes, object masks and pixel classes."""
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    box = torch.tensor([[10.0, 5.0, 50.0, 35.0]])
    label = torch.tensor([1])
    inside = torch.zeros(1, 40, 60, dtype=torch.uint8)
    inside[:, 5:35, 10:50] = 1
    pixels = torch.full((40, 60), 255, dtype=torch.uint8)
    pixels[:, :30] = 1
    output = [
        Panel(image, "truth", boxes=box, labels=label),
        Panel(image, "answer", boxes=box, labels=label, scores=torch.tensor([0.9])),
        Panel(image, "objects", boxes=box, labels=label, masks=inside),
        Panel(image, "classes", mask=pixels),
    ]
    sheets = []
    for count in (1, 3, 4):
        path = tmp_path / f"{count}.png"
        plots.grid([output[:count]] * 2, ("cat", "dog"), path)
        sheets.append(pixels_of(path))
    assert [sheet.shape[1] for sheet in sheets] == sorted(sheet.shape[1] for sheet in sheets)
    tint = np.array(draw.colour(1))
    assert all((sheet == tint).all(2).sum() > 100 for sheet in sheets)
    plain = tmp_path / "plain.png"
    plots.grid([[Panel(image, "plain")]], ("cat", "dog"), plain)
    assert not (pixels_of(plain) == tint).all(2).any()


def test_malicious_captions_are_drawn_as_text(tmp_path):
    """No formula is interpreted and no warning raised; `filterwarnings = error` is on."""
    plots.grid(panels(torch.rand(len(ODD), 3, 8, 8), ODD), (), tmp_path / "grid.png")
    assert pixels_of(tmp_path / "grid.png").std() > 1


def test_invalid_images_are_refused(tmp_path):
    with pytest.raises(TesseraError, match="float32 can't be drawn"):
        plots.grid([[Panel(torch.rand(3, 4, 4))]], (), tmp_path / "a.png")
    with pytest.raises(TesseraError, match="an image of shape"):
        plots.grid(panels(torch.rand(2, 5, 4, 4), ["a", "b"]), (), tmp_path / "a.png")
    with pytest.raises(TesseraError, match="no image"):
        plots.grid(panels(torch.rand(0, 3, 4, 4), []), (), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_global_state_is_not_changed(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from pipelines.visuals import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from models.core.family import Panel\n"
        "panel = Panel(torch.zeros(1, 2, 2, dtype=torch.uint8), 'a')\n"
        f"plots.grid([[panel]], (), Path({str(tmp_path / 'a.png')!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
