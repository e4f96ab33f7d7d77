"""The page in a browser: no errors, tabs and steppers by mouse and keyboard, hostile texts, phones, accessibility."""

from __future__ import annotations

import shutil
from pathlib import Path

import audits
import pytest

from rmfast.audit import render

playwright = pytest.importorskip("playwright.sync_api")
for _library in ("altair", "vl_convert", "optuna"):
    pytest.importorskip(_library)

TABS = ["overview", "calibration", "biases", "pairs", "tokens", "layers", "facts"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(render(audits.small_audit()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as run:
        try:
            found = run.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium (apt install chromium, or playwright install chromium): {error}")
        yield found
        found.close()


@pytest.fixture
def opened(browser, file):
    """Opens the page; at the end nothing was logged, and nothing but the file was asked for."""
    logged, asked, contexts = [], [], []

    def open_(width: int = 1100, scheme: str = "light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)  # a machine that is busy with other things
        page.on("console", lambda message: logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#overview svg")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert logged == []
    assert set(asked) == {file.as_uri()}


def show(page, tab: str) -> None:
    page.click(f"#tab-{tab}")
    for chart in page.query_selector_all(f"#{tab} [data-chart]"):
        if chart.is_visible():
            chart.wait_for_selector("svg")


def test_every_tab_shows_its_section_and_its_charts(opened):
    page = opened()
    for tab in TABS:
        show(page, tab)
        assert [section.get_attribute("id") for section in page.query_selector_all("main > section:not([hidden])")] == [
            tab
        ]
        assert page.get_attribute(f"#tab-{tab}", "aria-selected") == "true"


def test_tabs_follow_the_arrow_keys(opened):
    page = opened()
    page.focus("#tab-overview")
    for key, tab in (
        ("ArrowRight", "calibration"),
        ("End", "facts"),
        ("ArrowRight", "overview"),
        ("ArrowLeft", "facts"),
        ("Home", "overview"),
    ):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
        assert page.is_visible(f"#{tab}")


def test_tokens_are_stepped_through_by_button_keyboard_and_mouse(opened):
    page = opened()
    show(page, "tokens")
    side = page.locator(".stepper[data-side=chosen]")
    now, slider = side.locator(".now"), side.locator("input")
    last = int(slider.get_attribute("max"))
    assert slider.input_value() == str(last) and "here the score is read" in now.inner_text()
    assert side.get_by_label("Next token of the chosen text").is_disabled()
    first = now.inner_text()
    side.get_by_label("Previous token of the chosen text").click()
    assert slider.input_value() == str(last - 1) and now.inner_text() != first
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.input_value() == str(last - 2)
    assert side.locator(".words .here").count() == 1
    side.locator(".words span:not(.shared)").nth(0).click()
    assert slider.input_value() == "0" and "Token" in now.inner_text()


def test_pairs_are_stepped_through_and_lead_to_their_tokens(opened):
    page = opened()
    show(page, "tokens")
    select = page.locator("#tokens-pair")
    before, text = select.input_value(), page.inner_text(".stepper .now")
    page.locator("#tokens [data-pair-step='1']").click()
    assert select.input_value() != before and page.inner_text(".stepper .now") != text
    page.locator("#tokens [data-pair-step='-1']").click()
    assert select.input_value() == before
    show(page, "pairs")
    page.locator("#pairs [data-go=layers]").nth(0).click()
    assert page.is_visible("#layers") and page.locator("#layers-pair").input_value() == "0"


def test_hostile_texts_run_nothing_and_are_seen(opened):
    page = opened()
    for tab in TABS:
        show(page, tab)
    for index in range(page.locator("#tokens-pair option").count()):
        page.select_option(
            "#layers-pair" if page.is_visible("#layers-pair") else "#tokens-pair", str(index), force=True
        )
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script").count() == 0
    assert "<script>window.hacked" in page.locator("#facts").text_content()


@pytest.mark.parametrize("tab", TABS)
def test_no_sideways_scroll_on_a_phone(opened, tab):
    page = opened(width=360)
    show(page, tab)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_theme_is_the_systems_until_it_is_switched(opened):
    page = opened(scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    light = page.evaluate(background)
    assert sum(map(int, light[4:-1].split(","))) > 600 > 150 > sum(map(int, dark[4:-1].split(",")))
    page.wait_for_selector("#overview svg")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_axe_finds_no_fault(opened, scheme, width):
    axe = pytest.importorskip("axe_playwright_python")
    source = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    page = opened(width=width, scheme=scheme)
    page.evaluate(source)  # past the page's policy, which lets no other script in
    for tab in TABS:
        show(page, tab)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        faults = [(each["id"], each["impact"], [node["target"] for node in each["nodes"]][:4]) for each in found]
        assert faults == [], tab
