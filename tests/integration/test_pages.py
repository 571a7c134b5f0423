"""What MLflow's pages show after a training, in a real Chromium.

A small training is logged to an embedded store without a server, then served. Each link that
Tessera prints is opened in a new browser profile. TESSERA_UPDATE_PICTURE=1 writes the screenshots
of the README, which show a larger search.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import MARKS, NO_ASSISTANT

from jobs.cli import run, tessera
from jobs.shared import local_services
from pipelines import tag_names
from pipelines.workflows import services
from pipelines.workflows.context import Context

pytestmark = [*MARKS, pytest.mark.e2e]

DOCS = Path(__file__).parents[2] / "docs" / "images"
UPDATE = bool(os.environ.get("TESSERA_UPDATE_PICTURE"))
EPOCHS, STEPS = 8, 96
PATIENCE_MS = 60_000
"""How long a page may take; it is there within seconds, but not on a busy machine."""

Open = Callable[..., Any]


@dataclass(frozen=True)
class Trained:
    """A server, and what the commands printed before it was started."""

    server: str
    run: str
    run_page: str
    version_page: str
    decision_page: str
    search: str
    search_page: str


@pytest.fixture(scope="module")
def trained(
    prepared_store: Path,
    digits: Path,
    make_server: Callable[[Path], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """cnn on the digits: trained, evaluated and promoted without a server; then served."""
    root = tmp_path_factory.mktemp("pages") / ".tessera"
    shutil.copytree(prepared_store, root)
    server = make_server(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_HOME", str(root))
        patch.setenv("MLFLOW_PUBLIC_URL", server.uri)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        settings = f"--set train.epochs={EPOCHS} --set train.batch_size=128"
        settings += " --set train.log_every_steps=1"
        output = call(f"train cnn --workers 0 --data {digits} {settings} --json")
        call(f"evaluate digits --data {digits} --json")
        call("promote digits/1 --json")
        size = "--trials 2 --set train.epochs=1 --scheduler none --variant tiny"
        if UPDATE:
            size = f"--trials 8 --set train.epochs={EPOCHS} --variant tiny"
        result = call(f"tune cnn --workers-per-trial 0 --data {digits} {size} --json")
        registry = services.open_registry(Context.from_environment())
        version = registry.version("digits", 1)
        decision = services.attach_tracker(
            Context.from_environment(), version.tags[tag_names.DECISION]
        ).link()
    server.start()
    pages = registry.link(version), decision, result["search"], result["page"]
    return Trained(server.uri, output["run"], output["page"], *pages)


def call(words: str) -> Any:
    """Runs `tessera WORDS` in this process; returns the JSON that it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as left:
        run(tessera, "tessera", words.split())
    assert left.value.code == 0, out.getvalue()
    return json.loads(out.getvalue())


def keep(page: Any, name: str, tmp_path: Path) -> None:
    """Takes a screenshot; with TESSERA_UPDATE_PICTURE=1 it replaces the one in the README."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # charts grow when they come
    shot = (DOCS if UPDATE else tmp_path) / f"{name}.png"
    page.screenshot(path=shot)
    assert shot.stat().st_size > 30_000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.launch() as launched:
        yield launched


@pytest.fixture
def open_page(chromium: Any, trained: Trained) -> Iterator[Open]:
    """Opens an address in a new browser profile."""
    contexts = []
    elsewhere: list[str] = []

    def open_page(address: str, *, height: int = 900, script: str = "") -> Any:
        context = chromium.new_context(viewport={"width": 1280, "height": height})
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    own = (trained.server, "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(own)] == [], "it asks other hosts"


def see(page: Any, text: str, *, exact: bool = True) -> None:
    page.get_by_text(text, exact=exact).first.wait_for()


def is_training_view(page: Any) -> bool:
    """Only the model-training view lists the model registry on the left."""
    see(page, "Model training")
    page.wait_for_timeout(500)  # the list follows the view
    return bool(page.get_by_text("Model registry", exact=True).count())


def under(page: str, part: str) -> str:
    """The address of a tab of a run's page."""
    address, _, query = page.partition("?")
    return f"{address}/{part}?{query}"


def test_the_run_page_shows_model_data_and_metrics(open_page: Open, trained: Trained) -> None:
    page = open_page(trained.run_page)
    see(page, trained.run)
    for fact in ("Finished", "cnn", "train.epochs", "optim.model.lr", "val/accuracy"):
        see(page, fact)
    see(page, "digits/train", exact=False)
    assert is_training_view(page)


def test_the_version_has_its_aliases(open_page: Open, trained: Trained) -> None:
    page = open_page(trained.version_page)
    for fact in ("Version 1", "champion", "challenger", "tessera.digest", trained.run):
        see(page, fact, exact=False)
    assert is_training_view(page)


def test_the_run_page_opens_the_report(open_page: Open, trained: Trained, tmp_path: Path) -> None:
    report_page = under(trained.run_page, "artifacts/evaluation/test/report.html")
    page = open_page(report_page, height=1100, script=NO_ASSISTANT)
    report = page.frame_locator("iframe").first
    for fact in ("By class", "Robustness", "Costs", "The worst mistakes"):
        report.get_by_text(fact, exact=False).first.wait_for()
    assert report.locator("img").count() >= 3
    keep(page, "report", tmp_path)


def test_the_decision_page_has_policy_verdict_and_report(
    open_page: Open, trained: Trained, tmp_path: Path
) -> None:
    page = open_page(trained.decision_page)
    for fact in ("tessera.promotion.outcome", "promoted"):
        see(page, fact, exact=False)
    verdict = under(trained.decision_page, "artifacts/verdict.json")
    page = open_page(verdict, script=NO_ASSISTANT)
    for fact in ("policy.json", "report", "leakage"):
        see(page, fact, exact=False)
    keep(page, "decision", tmp_path)


def test_the_search_page_lists_its_trials_below_it(
    open_page: Open, trained: Trained, tmp_path: Path
) -> None:
    page = open_page(trained.search_page)
    see(page, trained.search)
    see(page, "Child runs", exact=False)
    for image in ("history", "parallel_coordinates"):
        address = under(trained.search_page, f"artifacts/pictures/{image}.png")
        shown = open_page(address, height=600, script=NO_ASSISTANT)
        shown.wait_for_function("() => [...document.images].some(i => i.naturalWidth > 300)")
    keep(shown, "search", tmp_path)


def test_the_link_that_up_prints_leads_to_the_run(open_page: Open, trained: Trained) -> None:
    page = open_page(local_services.mlflow_pages(trained.server))
    assert is_training_view(page)
    page.get_by_text(trained.run, exact=True).first.click()
    see(page, "About this run")  # MLflow's own links leave the view: ours must not


def test_without_a_training_the_link_of_up_shows_the_experiments(
    open_page: Open, trained: Trained
) -> None:
    page = open_page(local_services.mlflow_pages(trained.server, "none of this name"))
    see(page, "Time created")
    assert is_training_view(page)


def test_an_address_without_parameters_opens_the_genai_view(
    open_page: Open, trained: Trained
) -> None:
    """Control: without the parameters of our links, MLflow opens its GenAI view."""
    bare = trained.run_page.partition("?")[0]
    for address in (trained.server, bare):
        assert not is_training_view(open_page(address))


@pytest.mark.parametrize(
    "image",
    [
        "training_samples",
        "confusion_matrix",
        "learning_curves",
        "worst_mistakes",
        f"epochs/val-{EPOCHS:05d}",
    ],
)
def test_logged_images_are_shown(open_page: Open, trained: Trained, image: str) -> None:
    page = open_page(under(trained.run_page, f"artifacts/pictures/{image}.png"))
    see(page, f"{Path(image).name}.png")
    page.wait_for_function("() => [...document.images].some(i => i.naturalWidth > 300)")


def test_preview_images_have_a_slider_over_the_epochs(open_page: Open, trained: Trained) -> None:
    """MLflow shows the series with a slider over the epochs."""
    page = open_page(under(trained.run_page, "model-metrics"), height=1000, script=NO_ASSISTANT)
    see(page, "Add section")
    page.mouse.move(640, 600)
    for _ in range(8):  # charts are made where they come into view
        page.mouse.wheel(0, 1500)
        page.wait_for_timeout(500)
    slider = page.get_by_role("slider").last
    slider.focus()
    for step in (1, 2):
        page.keyboard.press("ArrowRight")
        shown = f"i => i.src.includes('val%2Bstep%2B{step}%2B') && i.naturalWidth > 100"
        page.wait_for_function(f"() => [...document.images].some({shown})")


def test_metric_curves_are_drawn(open_page: Open, trained: Trained, tmp_path: Path) -> None:
    """A curve for each metric with a point for each step, as in the screenshot of the README."""
    page = open_page(under(trained.run_page, "model-metrics"), height=1000, script=NO_ASSISTANT)
    metrics = "train/(accuracy|loss|lr)|val/(accuracy|f1|loss)"
    page.get_by_placeholder("Search metric charts").fill(metrics)
    page.get_by_text("calibration_error").first.wait_for(state="detached")  # filtered out
    drawn = (
        "[...document.querySelectorAll('.js-plotly-plot')].filter(p => p.data?.[0]?.x?.length > 1)"
    )
    page.wait_for_function(f"() => {drawn}.length === 6")
    points = page.evaluate(f"() => {drawn}.map(plot => plot.data[0].x.length)")
    assert sorted(points) == [EPOCHS] * 3 + [STEPS] * 3
    keep(page, "mlflow", tmp_path)


def test_system_metrics_are_drawn(open_page: Open, trained: Trained) -> None:
    page = open_page(under(trained.run_page, "system-metrics"))
    see(page, "cpu_utilization_percentage", exact=False)
