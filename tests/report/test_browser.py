"""The report in a real browser: drawn, quiet, asking nobody, and text as text. Needs playwright and a Chromium."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.report.test_page import make_run, make_summary
from tests.report.test_watch import append, serving
from trimtab.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page
else:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install -e '.[dev]')"
    )

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium)")

HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    '"><img src=x onerror="document.title = 1">',
    "<b>bold</b> & &lt;entities&gt; ${x} {{ 7 * 7 }}",
    "🎬 👩‍👩‍👧 emoji, مرحبا بالعالم and שלום, 你好",
]


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Seen:
    """A page with all that it asked for and complained about."""

    def __init__(self, browser: "Browser", **settings: Any) -> None:
        self.context = browser.new_context(**settings)
        self.page: Page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text}"))

    def open(self, address: str) -> "Page":
        self.page.goto(address)
        return self.page


@pytest.fixture
def seen(browser: "Browser") -> Iterator[Seen]:
    found = Seen(browser, color_scheme="light", viewport={"width": 1100, "height": 800})
    yield found
    found.context.close()
    assert found.complaints == []
    homes = {urlsplit(url)[:2] for url in found.asked if not url.startswith(("blob:", "data:"))}
    assert len(homes) == 1, f"requests went to {homes}"


def entry(i: int, text: str, prompt: str = "") -> dict[str, Any]:
    answers = {
        "start": {"text": f"Start {i}.", "gold": 0.0, "proxy": i % 3},
        "best-of-4": {"text": text, "gold": i / 100, "proxy": 5.0, "kl": 0.6, "kl_is_bound": True},
        "dpo": {"text": f"Trained {i}. {text}", "gold": -i / 1000, "proxy": 9.0, "kl": 4.5},
    }
    return {"prompt": prompt or f"Prompt number {i}.", "answers": answers}


def cards(page: "Page") -> "Locator":
    return page.locator("#cards > article")


def test_plots_are_drawn_and_nothing_is_asked_for(seen: Seen, tmp_path: Path):
    run = make_run(tmp_path / "run", 50)
    file = write_report([run], tmp_path / "report.html", make_summary([entry(i, "Fine.") for i in range(3)]))
    page = seen.open(file.as_uri())
    plots = page.locator(".plot")
    assert plots.count() >= 4
    for i in range(plots.count()):
        assert plots.nth(i).locator(".main-svg").count() > 0
        assert plots.nth(i).locator(".trace, .bars .point").count() > 0, plots.nth(i).get_attribute("aria-label")
    assert seen.asked == [file.as_uri()]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_models_say_is_text(seen: Seen, tmp_path: Path, hostile: str):
    file = write_report([], tmp_path / "report.html", make_summary([entry(1, hostile, prompt=hostile)]))
    page = seen.open(file.as_uri())
    assert page.locator(".prompt").text_content() == hostile
    assert page.locator(".answer").nth(1).text_content() == hostile
    assert page.locator("#cards img, #cards script, #cards b").count() == 0
    assert page.title() == "Steering tiny · trimtab"


def test_right_to_left_script_runs_from_the_right(seen: Seen, tmp_path: Path):
    texts = [entry(1, "שלום עולם", prompt="مرحبا بالعالم"), entry(2, "Hello.")]
    page = seen.open(write_report([], tmp_path / "report.html", make_summary(texts)).as_uri())
    direction = "node => getComputedStyle(node).direction"
    found = {page.locator(".prompt").nth(i).evaluate(direction) for i in range(2)}
    assert found == {"rtl", "ltr"}


def test_the_search_box_leaves_what_it_finds(seen: Seen, tmp_path: Path):
    texts = [entry(i, "A needle in HAY." if i == 77 else "Nothing here.") for i in range(100)]
    page = seen.open(write_report([], tmp_path / "report.html", make_summary(texts)).as_uri())
    assert (cards(page).count(), page.locator("#count").text_content()) == (12, "100 texts")
    page.fill("#search", "hay needle")
    assert (cards(page).count(), page.locator("#count").text_content()) == (1, "1 of 100")
    assert page.locator(".prompt").text_content() == "Prompt number 77."
    page.fill("#search", "no such word")
    assert (cards(page).count(), page.locator("#count").text_content()) == (0, "0 of 100")
    page.fill("#search", "")
    assert cards(page).count() == 12


def test_more_texts_come_when_asked_for(seen: Seen, tmp_path: Path):
    texts = [entry(i, "Fine.") for i in range(30)]
    page = seen.open(write_report([], tmp_path / "report.html", make_summary(texts)).as_uri())
    more = page.locator("#more")
    assert more.text_content() == "Show 12 more of 18"
    more.click()
    assert (cards(page).count(), more.text_content()) == (24, "Show 6 more of 6")
    more.click()
    assert cards(page).count() == 30 and more.is_hidden()


def test_orders_change_what_comes_first(seen: Seen, tmp_path: Path):
    texts = [entry(i, "Fine.") for i in range(20)]
    page = seen.open(write_report([], tmp_path / "report.html", make_summary(texts)).as_uri())
    first = page.locator(".prompt").first
    for order, number in (("changed", 19), ("lowest", 19), ("highest", 19), ("worst", 19)):
        page.select_option("#order", order)
        assert first.text_content() == f"Prompt number {number}."
    page.select_option("#order", "suspicious")
    assert first.text_content() == "Prompt number 0."  # of which best-of-4 has a sign, too
    assert page.locator(".signs").nth(1).text_content() == "proxy reward rose by 9.00, gold reward did not (0.00)"
    assert "KL 4.50" in (cards(page).first.text_content() or "")


def test_thousands_of_texts_are_no_burden(seen: Seen, tmp_path: Path):
    texts = [entry(i, f"Word{i} " * 40) for i in range(4000)]
    page = seen.open(write_report([], tmp_path / "report.html", make_summary(texts)).as_uri())
    took = page.evaluate(
        """() => {
          const search = document.getElementById("search"), began = performance.now();
          search.value = "word3999"; search.dispatchEvent(new Event("input"));
          return performance.now() - began;
        }"""
    )
    assert cards(page).count() == 1 and took < 1000
    assert page.evaluate("document.querySelectorAll('*').length") < 3000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_the_readers(browser: "Browser", tmp_path: Path, scheme: str):
    file = write_report([make_run(tmp_path / "run")], tmp_path / "report.html", make_summary([entry(1, "Fine.")]))
    seen = Seen(browser, color_scheme=scheme)
    page = seen.open(file.as_uri())
    assert luminance(page, "background-color") < 0.2 if scheme == "dark" else luminance(page, "background-color") > 0.8
    assert abs(luminance(page, "background-color") - luminance(page, "color")) > 0.5
    page.click("#theme")
    assert page.locator("html").get_attribute("data-theme") == ("light" if scheme == "dark" else "dark")
    assert seen.complaints == []
    seen.context.close()


def luminance(page: "Page", what: str) -> float:
    """Of the body, 0 is black and 1 white."""
    value = page.evaluate("what => getComputedStyle(document.body).getPropertyValue(what)", what)
    red, green, blue = (int(part) for part in re.findall(r"\d+", value)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


@pytest.mark.parametrize("width", [360, 1400])
def test_no_width_makes_the_page_wider_than_the_window(browser: "Browser", tmp_path: Path, width: int):
    texts = [entry(1, "word " * 200, prompt="x" * 500)]
    file = write_report([make_run(tmp_path / "run")], tmp_path / "report.html", make_summary(texts))
    seen = Seen(browser, viewport={"width": width, "height": 800})
    page = seen.open(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    seen.context.close()


def until(page: "Page", expression: str) -> None:
    """Wait until it holds. (Playwright's own way evaluates strings in the page, which the page's policy forbids.)"""
    for _ in range(300):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never came: {expression}")


class TestWatch:
    def grow(self, run: Path, step: int, loss: float = 0.25) -> None:
        append(run / "metrics.jsonl", json.dumps({"step": step, "loss": loss, "reward": 1.0}) + "\n")

    def top(self, page: "Page") -> float:
        return page.evaluate("document.getElementById('texts').getBoundingClientRect().top")

    def test_what_is_written_comes_in_and_the_reader_is_left_alone(self, seen: Seen, tmp_path: Path):
        rows = [{"step": 0, "prompt": f"Question {i}?", "response": "So. " * 30} for i in range(40)]
        samples = "".join(json.dumps(row) + "\n" for row in rows)
        run = make_run(tmp_path / "run", 5, samples_jsonl=samples)
        with serving(run) as address:
            page = seen.open(address)
            page.wait_for_selector("#live[data-state=live]")
            drawn = page.locator(".plot").count()
            page.locator("#facts summary").first.click()
            page.fill("#search", "question 3")
            found = cards(page).count()
            page.evaluate("scrollTo({top: document.getElementById('texts').offsetTop, behavior: 'instant'})")
            top = self.top(page)
            self.grow(run, 6)
            append(run / "metrics.jsonl", '{"step": 7, "lo')  # and half a line
            until(page, f"document.querySelectorAll('.plot').length > {drawn}")  # a reward has been measured
            assert page.evaluate("document.querySelector('[aria-label^=Loss]').data[0].x.at(-1)") == 6
            assert page.locator(".plot:not(:has(.main-svg))").count() == 0
            assert page.locator("#search").input_value() == "question 3" and cards(page).count() == found
            assert page.locator("#count").text_content() == "13 of 40"
            assert page.locator("#facts details").first.get_attribute("open") is not None
            until(page, f"Math.abs(document.getElementById('texts').getBoundingClientRect().top - {top}) < 20")
            assert page.evaluate("scrollY") > 300
            assert "live · changed" in (page.locator("#live").text_content() or "")
            late = {"step": 6, "prompt": "Question 3?", "response": "After <i>all</i>."}
            append(run / "samples.jsonl", json.dumps(late) + "\n")
            until(page, "document.getElementById('cards').textContent.includes('After <i>all</i>.')")
            (run / "environment.json").write_text('{"finished": 6}')
            page.wait_for_selector("#live[data-state=finished]")

    def test_what_is_drawn_stays_when_only_numbers_change(self, seen: Seen, tmp_path: Path):
        run = make_run(tmp_path / "run", 5)
        with serving(run) as address:
            page = seen.open(address)
            page.evaluate("document.querySelector('.plot').mine = true")
            page.evaluate("Plotly.relayout(document.querySelector('.plot'), {'xaxis.range': [2, 3]})")
            append(run / "metrics.jsonl", '{"step": 6, "loss": 0.25, "accuracy": 0.5}\n')
            until(page, "document.querySelector('.plot').data[0].x.at(-1) === 6")
            assert page.evaluate("document.querySelector('.plot').mine") is True
            assert page.evaluate("document.querySelector('.plot').layout.xaxis.range") == [2, 3]

    def test_a_run_that_has_not_begun_is_waited_for(self, seen: Seen, tmp_path: Path):
        run = tmp_path / "run"
        run.mkdir()
        with serving(run) as address:
            page = seen.open(address)
            assert page.locator(".waiting").text_content() == "Waiting for the first metrics of run."
            self.grow(run, 1)
            page.wait_for_selector("#live[data-state=live]")
            until(page, "document.querySelectorAll('.plot .main-svg').length > 0")
            assert page.locator(".waiting").count() == 0

    def test_a_server_that_is_gone_is_said_to_be(self, browser: "Browser", tmp_path: Path):
        seen = Seen(browser)
        with serving(make_run(tmp_path / "run")) as address:
            page = seen.open(address)
        page.wait_for_selector("#live[data-state=gone]")
        assert "no answer from trimtab watch" in (page.locator("#live").text_content() or "")
        assert all(line.startswith("error: Failed to load resource") for line in seen.complaints)
        seen.context.close()
