"""The page about a data set: its content, its size, and that text from the data is escaped.

test_report_page.py opens it in a real browser.
"""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from packed_sets import Sample, pack_set, pair
from PIL import Image

from pipelines.data.annotations import Mask, Objects
from pipelines.data.inspection import report, survey

ROOT = Path(__file__).parents[4]
TIMES = "\N{MULTIPLICATION SIGN}"


class Page(HTMLParser):
    """The tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def noise(number: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def labelled(labels: list[int], width: int = 40, height: int = 30) -> list[Sample]:
    return [(f"k{n:05d}", noise(n, width, height), label) for n, label in enumerate(labels)]


def render(folder: Path, samples: int = 8) -> str:
    from pipelines.data import card as cards

    return report.render(survey.take(folder, cards.read(folder), samples=samples))


def test_the_page_shows_the_content_of_the_card(tmp_path: Path) -> None:
    rows = [{"key": "k", "origin": "a/b.jpg", "reason": "box without area", "detail": "object 4"}]
    sides = {"train": labelled([0, 0, 1]), "test": labelled([1])}
    pairs = [pair(("train", "k00000"), ("test", "k00000"), 17)]
    card = pack_set(
        tmp_path / "pets",
        "classification",
        sides,
        ("cat", "dog"),
        rejected=rows,
        pairs=pairs,
        licence="CC0",
        source="image_folder:pets",
    )
    html = render(tmp_path / "pets")
    page = Page(html)
    for part in (
        *("pets", "classification", "CC0", "image_folder:pets", card.digest, f"40 {TIMES} 30"),
        *("17 bits of 255", "1 pair of 2 images", "1 box without area", "a/b.jpg", "object 4"),
        "1 of 2 classes is missing in a split",
    ):
        assert part in page.text
    assert len(page.all("img")) == 3 + 1 + 2
    assert html == render(tmp_path / "pets"), "the same data gives the same page"


def test_the_page_loads_nothing_and_runs_no_script(tmp_path: Path) -> None:
    pack_set(tmp_path, "classification", {"train": labelled([0, 1])}, ("a", "b"))
    page = Page(render(tmp_path))
    assert all((img["src"] or "").startswith("data:image/") for img in page.all("img"))
    assert not {"script", "link", "iframe", "object", "form", "base"} & {t for t, _ in page.tags}
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert all((a.get("href") or "#").startswith("#") for _, a in page.tags)
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def boxes(number: int) -> Objects:
    edges = np.array([[1, 1, 10, 10], [5, 5, 30, 25.0]])[: number % 3]
    return Objects(edges, np.arange(len(edges)), np.zeros(len(edges), bool))


@pytest.mark.parametrize("task", ["detection", "semantic_segmentation", "images"])
def test_every_task_has_a_page(tmp_path: Path, task: str) -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[:15] = 1
    annotations = {"detection": boxes, "semantic_segmentation": lambda n: Mask(mask)}.get(task)
    given: list[Sample] = [
        (f"k{n}", noise(n), annotations(n) if annotations else None) for n in range(9)
    ]
    pack_set(tmp_path, task, {"train": given}, ("ground", "sky") if annotations else ())
    page = Page(render(tmp_path))
    assert len(page.all("img")) == 8
    expected = {
        "detection": ("objects in an image", "√ of box area", "no objects", "ground", "Classes"),
        "semantic_segmentation": ("share of the pixels", "50.00 %", "sky"),
        "images": (f"All images are 40 {TIMES} 30",),
    }
    for part in expected[task]:
        assert part in page.text
    assert ("Classes" in page.text) == bool(annotations)


@pytest.mark.parametrize("count", [41, 1000, 3000])
def test_many_classes_are_readable(tmp_path: Path, count: int) -> None:
    labels = [n % count for n in range(200)]
    names = tuple(f"class {number}" for number in range(count))
    pack_set(tmp_path, "classification", {"train": labelled(labels, 8, 8)}, names)
    html = render(tmp_path)
    page = Page(html)
    assert f"{count - 20:,} between" in page.text
    listed = min(count, report.LISTED_CLASSES)
    assert html.count('<td class="name">') == 20 + listed
    assert f"{'all' if listed == count else 'the first'} {listed:,} classes" in page.text
    assert len(html) < 2_000_000


@pytest.mark.slow
def test_the_page_has_a_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_set(tmp_path, "images", {"train": labelled_none(30, 900, 700)})
    monkeypatch.setattr(report, "IMAGE_BYTES", 500_000)
    html = render(tmp_path, samples=30)
    assert len(html) < 500_000 * 4 / 3 + 60_000
    assert html.count("<img") + html.count("or the page would be too large") == 30
    monkeypatch.setattr(report, "IMAGE_BYTES", 100_000_000)  # the control: they would not fit
    assert len(render(tmp_path, samples=30)) > 1_000_000


def labelled_none(count: int, width: int, height: int) -> list[Sample]:
    return [(f"k{n:05d}", noise(n, width, height), None) for n in range(count)]


@pytest.mark.slow
def test_long_names_do_not_make_the_page_large(tmp_path: Path) -> None:
    """All lists and names are limited; the size of images is limited separately."""
    word = '"' * 5000  # each is written with five characters
    names = [f"{number} {word}" for number in range(1200)]
    edges = np.array([[1, 1, 10, 10.0]] * 9)
    sides: dict[str, list[Sample]] = {
        split: [
            (f"k{n}", noise(n), Objects(edges, np.arange(9) + 9 * n, np.zeros(9, bool)))
            for n in range(24)
        ]
        for split in ("train", "val", "test")
    }
    rejected = [dict.fromkeys(("key", "origin", "reason", "detail"), word)] * 1000
    pairs = [pair(("train", word), ("test", word), 3)] * 1000
    pack_set(tmp_path, "detection", sides, names, rejected=rejected, pairs=pairs)
    html = render(tmp_path, samples=24)
    text = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", html)
    assert len(text) + report.IMAGE_BYTES * 4 / 3 < 10_000_000


def test_histograms_count_each_value_once() -> None:
    rng = np.random.default_rng(0)
    for spread in (False, True):
        values = rng.uniform(3, 900, 1000).tolist()
        edges = report.bin_edges(min(values), max(values), spread=spread)
        drawn = report.histogram("x", values, edges)
        counts = [int(b.title.rsplit(": ")[1].replace(",", "")) for b in drawn.bins]
        assert sum(counts) == 1000
        assert max(b.height for b in drawn.bins) == 1
    whole = report.histogram("n", [0, 0, 1, 5], report.bin_edges(0, 5, whole=True), whole=True)
    assert [b.title for b in whole.bins] == ["0: 2", "1: 1", "5: 1"]
    wide = report.bin_edges(0, 99, whole=True)
    titles = [b.title for b in report.histogram("n", range(100), wide, whole=True).bins]
    assert len(titles) <= report.MOST_BINS
    assert titles[0] == "0 to 4: 5"


def test_the_histograms_of_all_splits_have_one_range(tmp_path: Path) -> None:
    sides: dict[str, list[Sample]] = {
        "train": [(f"a{n}", noise(n, 40 + n, 30), None) for n in range(10)],
        "val": [("b", noise(1, 300, 30), None)],
    }
    pack_set(tmp_path, "images", sides)
    ends = re.findall(r'<div class="ends"><span>(.*?)</span><span>(.*?)</span>', render(tmp_path))
    assert ends == [("40", "300"), ("1.33", "10")] * 2


def test_the_template_is_installed_with_the_package() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = config["tool"]["setuptools"]["package-data"]
    assert any(fnmatch(report.TEMPLATE, pattern) for pattern in data["*"])
