"""Charts and grids of images, as PNG files.

In: panels or charts. Out: one PNG at the given path, whose folder is created. Must not know what
was trained or where the files go. Charts use matplotlib's objects, without pyplot and its global
state, and matplotlib is loaded only when one is drawn. Grids are put together with Pillow, which
takes a hundredth of the time.

    N images, C channels (1 or 3), H height, W width, K classes
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from models.core.errors import TesseraError
from models.core.family import Chart, Panel
from pipelines.visuals import draw
from pipelines.visuals.draw import font, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 120
TILE_PIXELS, GAP_PIXELS, CAPTION_PIXELS = 144, 12, 13
LARGE_TILE_PIXELS = 288
SMALL_PIXELS = 96
"""Images up to this size get small tiles, unless objects are drawn on them."""
COLOUR, DIAGONAL = "#1f6f8b", "#8a94a6"


def grid(groups: Sequence[Sequence[Panel]], classes: Sequence[str], path: Path) -> None:
    """Draws panels with their captions. Panels of a group are side by side, and a row has as many
    groups as fit. `classes` are the names of the panels' labels.

    Raises TesseraError if there is no panel, or for an image that isn't uint8 (1 or 3, H, W).
    """
    panels = [panel for group in groups for panel in group]
    if not panels:
        raise TesseraError("there is no image to draw")
    for panel in panels:
        size = tuple(panel.image.shape)
        if len(size) != 3 or size[0] not in (1, 3) or panel.image.dtype != torch.uint8:
            raise TesseraError(f"an image of shape {size} and {panel.image.dtype} can't be drawn")
    wide = max(len(group) for group in groups)
    large = any(max(p.image.shape[-2:]) > SMALL_PIXELS or p.boxes is not None for p in panels)
    width = LARGE_TILE_PIXELS if large else TILE_PIXELS
    most = 4 if large or len(panels) <= 12 else 8
    across = min(len(groups), max(1, most // wide))
    shape = max(min(max(p.image.shape[1] / p.image.shape[2], 0.4), 2.5) for p in panels)
    height = round(width * shape)
    texts = {id(p): _wrapped(p.caption, width) for p in panels}
    lines = max(text.count("\n") + 1 if text else 0 for text in texts.values())
    band = lines * (CAPTION_PIXELS + 4) + 6
    step_x, step_y = width + GAP_PIXELS, height + band + GAP_PIXELS
    group_x = wide * step_x + (GAP_PIXELS if wide > 1 else 0)
    rows = math.ceil(len(groups) / across)
    size = (across * group_x + GAP_PIXELS, rows * step_y + GAP_PIXELS)
    sheet = Image.new("RGB", size, "white")
    write = ImageDraw.Draw(sheet)
    letters = font(CAPTION_PIXELS)
    for position, group in enumerate(groups):
        for column, panel in enumerate(group):
            x = GAP_PIXELS + position % across * group_x + column * step_x
            y = GAP_PIXELS + position // across * step_y
            tile = _tile(panel, classes, width, height)
            sheet.paste(tile, (x + (width - tile.width) // 2, y + band))
            middle = (x + width / 2, y + band - 4)
            write.multiline_text(
                middle, texts[id(panel)], "black", letters, anchor="md", align="center"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _wrapped(caption: str, width: int) -> str:
    columns = round(width / 6.5)
    return "\n".join(textwrap.wrap(one_line(caption), columns, max_lines=3, placeholder="…"))


def _tile(panel: Panel, classes: Sequence[str], width: int, height: int) -> Image.Image:
    """The panel, as large as fits; enlarged pixels stay visible."""
    high, wide = panel.image.shape[-2:]
    scale = min(width / wide, height / high)
    return draw.draw(panel, classes, side=max(1, round(max(high, wide) * scale)))


def draw_charts(charts: Sequence[Chart], path: Path) -> None:
    """Draws charts side by side."""
    axes = _panels(4.4, 4.0, 1, len(charts), top=0.35)
    figure = axes[0].figure
    for axis, chart in zip(axes, charts):
        if chart.diagonal:
            axis.plot([0, 1], [0, 1], color=DIAGONAL, linewidth=1, linestyle="--")
        for number, (name, (x, y)) in enumerate(chart.lines.items()):
            label = textwrap.shorten(one_line(name), 24, placeholder="…")
            marker = "o" if len(x) <= 30 else None
            colour = draw.hex_colour(number) if len(chart.lines) > 1 else COLOUR
            axis.plot(x, y, label=label, color=colour, marker=marker, markersize=3, linewidth=1.4)
        axis.set_xlim(0, 1.01)
        axis.set_ylim(0, 1.01)
        axis.set_xlabel(chart.x, fontsize=9)
        axis.set_ylabel(chart.y, fontsize=9)
        axis.set_title(chart.title, fontsize=10, loc="left", parse_math=False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if len(chart.lines) > 1:
            for text in axis.legend(fontsize=7, frameon=False, loc="lower left").get_texts():
                text.set_parse_math(False)
    save(figure, path)


def _panels(width: float, height: float, rows: int, columns: int, *, top: float) -> Any:
    """Axes in rows and columns, each in a part of that many inches, with room for labels below and
    at the left, and `top` inches above. Measuring the labels would take as long as drawing them."""
    left, right, below = 0.62, 0.12, 0.45
    figure = new_figure(width * columns, height * rows, layout=None)
    figure.subplots_adjust(
        left=left / (width * columns),
        right=1 - right / (width * columns),
        bottom=below / (height * rows),
        top=1 - top / (height * rows),
        wspace=(left + right) / (width - left - right),
        hspace=(below + top) / (height - below - top),
    )
    return figure.subplots(rows, columns, squeeze=False).ravel()


def new_figure(width_inches: float, height_inches: float, layout: Any = "constrained") -> Figure:
    from matplotlib.figure import Figure

    size = (width_inches, height_inches)
    return Figure(figsize=size, dpi=DOTS_PER_INCH, layout=layout, facecolor="white")


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG. `savefig` would draw the figure twice if it has a layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # A class name in a script that the font doesn't have is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        FigureCanvasAgg(figure).print_png(path)
