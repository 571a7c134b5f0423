"""The page about a data set in a real browser: it runs no script, fits, and needs no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import jinja2
import numpy as np
import pytest
from browser import MARKS
from packed_sets import Sample, pack_set, pair
from PIL import Image

from pipelines.data.annotations import Objects
from pipelines.data.inspection import report, survey

pytestmark = MARKS

PLANTED = (
    "<script>document.title='ran'</script>",
    "<img src=x onerror=\"document.title='ran'\">",
    "</style></title></table><svg onload=\"document.title='ran'\">",
    "\"' onmouseover=document.title='ran' style=position:fixed;inset:0 x='",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:document.title='ran'",
    "W" * 400,
    "\u202egnp.exe\u202c\0\x1b[31m",
    "日本語 العربية 🐈",
)
WIDTHS = {"phone": (390, 844), "window": (1400, 900)}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.launch() as launched:
        yield launched


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> survey.Survey:
    """A data set with markup in every text. Keys in a shard can't have any, but those in lists
    can."""
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    count = len(PLANTED)
    edges = np.array([[10 * n, 5 * n, 10 * n + 40, 5 * n + 50.0] for n in range(count)])

    def given(number: int) -> Sample:
        pixels = rng.integers(0, 256, (90 + 10 * number, 160, 3), dtype=np.uint8)
        objects = Objects(edges, np.arange(count), np.arange(count) % 4 == 3)
        return f"{'k' * 80}{number}", Image.fromarray(pixels), objects

    sides = {split: [given(number) for number in range(6)] for split in ("train", "val")}
    key = f"{'k' * 80}0"
    card = pack_set(
        folder,
        "detection",
        sides,
        PLANTED,
        name=PLANTED[0],
        source=PLANTED[1],
        licence=PLANTED[2],
        rejected=[dict.fromkeys(("key", "origin", "reason", "detail"), word) for word in PLANTED],
        pairs=[pair(("train", key), ("val", key), 3)]
        + [pair(("train", word), (word, word), 4) for word in PLANTED],
    )
    return survey.take(folder, card, samples=6)


class Opened:
    """A page with its requests and its messages."""

    def __init__(self, chromium: Any, file: Path, size: tuple[int, int], scheme: str) -> None:
        self.requests: list[str] = []
        self.messages: list[str] = []
        width, height = size
        self.context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("dialog", lambda dialog: self.messages.append(dialog.message))
        self.page.goto(file.as_uri())
        self.page.wait_for_timeout(300)  # an error handler of an image runs late


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", WIDTHS)
def test_no_script_runs_and_nothing_overflows(
    chromium: Any, hostile: survey.Survey, tmp_path: Path, size: str, scheme: str
) -> None:
    file = tmp_path / "page.html"
    file.write_text(report.render(hostile), encoding="utf-8")
    opened = Opened(chromium, file, WIDTHS[size], scheme)
    page = opened.page
    assert page.title() == f"{PLANTED[0]}: data set"
    assert page.evaluate("document.querySelectorAll('script, svg[onload], [onerror]').length") == 0
    wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1]
    outside = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .frame') &&"
        " e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    images = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(images) == 12 + 2
    assert all(images)
    for word in PLANTED[:6]:
        assert page.get_by_text(word, exact=True).count() > 0
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
    assert opened.messages == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 384) == (scheme == "light")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    opened.context.close()


@pytest.mark.parametrize(("policy", "title"), [(False, "ran"), (True, "data set")])
def test_without_escaping_the_content_policy_still_stops_the_script(
    chromium: Any,
    hostile: survey.Survey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: bool,
    title: str,
) -> None:
    """Control: each of the two protections works alone."""
    real = jinja2.Environment
    monkeypatch.setattr(
        jinja2, "Environment", lambda **settings: real(**{**settings, "autoescape": False})
    )
    html = report.render(hostile)
    if not policy:
        html = html.replace("Content-Security-Policy", "no-policy")
    file = tmp_path / "page.html"
    file.write_text(html, encoding="utf-8")
    opened = Opened(chromium, file, WIDTHS["window"], "light")
    assert opened.page.title().endswith(title)
    assert any("Content Security Policy" in line for line in opened.messages) == policy
    opened.context.close()


def test_a_thousand_classes_are_collapsed(chromium: Any, tmp_path: Path) -> None:
    sample: list[Sample] = [
        (f"k{n}", Image.new("RGB", (8, 8), (n, 2 * n, 90)), 10 * n) for n in range(100)
    ]
    names = [f"class {number}" for number in range(1000)]
    card = pack_set(tmp_path / "set", "classification", {"train": sample}, names)
    file = tmp_path / "page.html"
    file.write_text(report.render(survey.take(tmp_path / "set", card, samples=24)))
    opened = Opened(chromium, file, WIDTHS["phone"], "dark")
    height = "document.querySelector('#classes').getBoundingClientRect().height"
    folded = opened.page.evaluate(height)
    opened.page.get_by_text("all 1,000 classes").click()
    assert folded + 200 < opened.page.evaluate(height) < folded + 700
    row = opened.page.get_by_text("class 999", exact=True).last
    row.scroll_into_view_if_needed()
    assert row.is_visible()
    pixelated = "getComputedStyle(document.images[0]).imageRendering"
    assert opened.page.evaluate(pixelated) == "pixelated"
    opened.context.close()
