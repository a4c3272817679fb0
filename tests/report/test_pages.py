"""The report and the audit as a reader sees them: opened from the file system in a real browser."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from testing.browser import Visit, chromium, expect

from hf_dissect.auditing.page import write_page
from hf_dissect.auditing.thumbnails import write_thumbnails
from hf_dissect.data import as_pairs, make_scenes
from hf_dissect.data.bad_rows import BadRows
from hf_dissect.report.selection import PairSample, RunSummary, write_report

SCRIPT = "<script>alert(1)</script>"
CAPTIONS = [f"pair {number} of {'odd' if number % 2 else 'even'} kind" for number in range(120)]
CAPTIONS[0] = f'{SCRIPT}</script><!-- <img src=x onerror=alert(2)> & "quoted"'


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def context(browser):
    with browser.new_context(color_scheme="light", viewport={"width": 1100, "height": 900}) as made:
        yield made


def table(count: int, captions: list[str], **more) -> pa.Table:
    score = np.linspace(-20, 10, count, dtype=np.float32)
    columns = {
        "sample_id": np.arange(count) + 2**62,
        "row": np.arange(count)[::-1],
        "caption": captions,
        "score": score,
        "p_mismatched": 1 / (1 + np.exp(score)),
        "correlation": np.linspace(40, 0, count),
    }
    return pa.table(columns | more)


@pytest.fixture(scope="module")
def audit_page(tmp_path_factory) -> Path:
    """120 pairs with pictures; the row that comes last in the data is the most suspicious one and has a script."""
    folder = tmp_path_factory.mktemp("audit")
    pairs = as_pairs(make_scenes(120))
    unpictured = write_thumbnails(folder / "thumbnails", pairs, range(119))
    assert unpictured == []
    differential = np.where(np.arange(120) < 10, np.nan, np.arange(120)).astype(np.float32)
    return write_page(
        folder / "audit.html",
        table(120, CAPTIONS, is_clean=np.arange(120) >= 30, ledger_differential=differential),
        title=f"Audit of {SCRIPT}",
        facts=[("Pairs", "120"), (SCRIPT, SCRIPT)],
        bad_rows=BadRows(1.0),
        pictures="thumbnails",
        unpictured=[119],
    )


@pytest.fixture
def visit(context, audit_page):
    opened = Visit(context, audit_page)
    yield opened
    opened.check()


def captions(visit: Visit) -> list[str]:
    return visit.page.locator(".caption").all_text_contents()


def status(visit: Visit) -> str:
    return visit.page.locator("#status").text_content()


def focused(visit: Visit) -> str:
    """The caption of the pair with the focus."""
    return visit.page.evaluate("document.activeElement.querySelector('.caption').textContent")


def test_the_first_page_shows_the_most_suspicious_pairs(visit):
    assert captions(visit) == CAPTIONS[:50]
    assert status(visit) == "1–50 of 120 pairs"
    first = visit.page.locator("#list li").first
    assert "#4611686018427387904" in first.text_content() and "truth: mismatched" in first.text_content()
    assert first.locator(".picture").text_content() == "no picture"


def test_markup_in_captions_and_titles_is_text(visit):
    assert visit.page.locator(".caption").first.text_content() == CAPTIONS[0]
    assert visit.page.title() == f"Audit of {SCRIPT}" == visit.page.locator("h1").text_content()
    assert visit.page.locator("main img[src=x]").count() == 0 and visit.page.locator(".caption *").count() == 0


def test_pictures_come_with_their_page(visit):
    def shown() -> set[int]:
        last = visit.page.locator("#list img").last
        last.scroll_into_view_if_needed()
        last.evaluate("image => image.decode()")
        return {int(Path(url).stem) for url in visit.requests if url.endswith(".jpg")}

    first = shown()
    assert first and first <= set(range(70, 119))  # rows are numbered backwards
    visit.page.keyboard.press("PageDown")
    assert first < shown() <= set(range(20, 119))
    row = visit.page.locator("#list li").nth(1).locator("img")
    assert row.evaluate("image => image.complete && image.naturalWidth") == 32
    assert row.get_attribute("src") == "thumbnails/0/68.jpg"


def test_text_and_ranges_filter(visit):
    page = visit.page
    page.fill("#text", "KIND odd")
    expect(page.locator("#status")).to_contain_text("without")
    assert captions(visit) == [caption for caption in CAPTIONS[1:] if "odd" in caption][:50]
    assert status(visit) == "1–50 of 60 pairs (120 without filters)"
    page.fill("#low", "-10")
    page.fill("#high", "-5")
    expect(page.locator("#status")).not_to_contain_text("of 60 pairs")
    score = np.linspace(-20, 10, 120).round(2)
    wanted = [i for i in range(1, 120, 2) if -10 <= score[i] <= -5]
    assert captions(visit) == [CAPTIONS[i] for i in wanted]
    page.fill("#text", "nowhere")
    expect(page.locator("#nothing")).to_be_visible()
    assert captions(visit) == []
    page.click("#clear")
    assert status(visit) == "1–50 of 120 pairs"


def test_sorting_by_another_measure_and_the_other_way(visit):
    page = visit.page
    page.select_option("#measure", "correlation")
    assert captions(visit) == CAPTIONS[:69:-1]
    page.click("#direction")
    assert captions(visit) == CAPTIONS[:50]
    page.select_option("#measure", "ledger_differential")  # ten are not known, and come last
    for first in (10, 119):
        assert captions(visit)[0] == CAPTIONS[first]
        page.click("#next")
        page.click("#next")
        assert captions(visit)[-10:] == CAPTIONS[:10]
        page.click("#direction")
    assert page.locator("#histogram rect").count() == 120


def test_pages_by_buttons_and_number(visit):
    page = visit.page
    assert page.locator("#previous").is_disabled()
    page.click("#next")
    assert captions(visit) == CAPTIONS[50:100] and status(visit) == "51–100 of 120 pairs"
    page.fill("#page", "3")
    page.keyboard.press("Enter")
    assert captions(visit) == CAPTIONS[100:] and page.locator("#next").is_disabled()
    page.fill("#page", "999")
    page.keyboard.press("Enter")
    assert page.input_value("#page") == "3" and captions(visit) == CAPTIONS[100:]


def test_everything_can_be_done_by_keys(visit):
    press = visit.page.keyboard.press
    press("j")
    press("ArrowDown")
    assert focused(visit) == CAPTIONS[2]
    outline = visit.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press("k")
    assert focused(visit) == CAPTIONS[1]
    press("PageDown")
    assert focused(visit) == CAPTIONS[50]
    press("k")  # over the edge of the page
    assert focused(visit) == CAPTIONS[49]
    press("j")
    assert focused(visit) == CAPTIONS[50]
    press("End")
    press("ArrowLeft")
    assert focused(visit) == CAPTIONS[50]
    press("Home")
    press("/")
    visit.page.keyboard.type("77")
    expect(visit.page.locator("#list li")).to_have_count(1)
    press("Escape")
    assert focused(visit) == CAPTIONS[77] and visit.page.input_value("#text") == "77"


def test_marks_are_kept_filtered_and_downloaded(visit, tmp_path):
    page = visit.page
    page.keyboard.press("j")
    page.keyboard.press("m")
    page.locator("#list li").nth(4).get_by_role("button", name="fine").click()
    page.locator("#list li").nth(5).get_by_role("button", name="fine").click()
    page.keyboard.press("f")  # the mark of the pair with the focus is taken away again
    page.reload()
    assert page.locator("[aria-pressed=true][data-mark]").count() == 2
    page.select_option("#marked", "fine")
    assert captions(visit) == [CAPTIONS[4]]
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "marks.csv")
    lines = (tmp_path / "marks.csv").read_text().splitlines()
    assert lines == ["sample_id,row,mark", f"{2**62 + 1},118,mismatched", f"{2**62 + 4},115,fine"]


def test_dark_by_the_system_and_by_the_button(browser, audit_page):
    def background(visit: Visit) -> str:
        return visit.page.evaluate("getComputedStyle(document.body).backgroundColor")

    with browser.new_context(color_scheme="dark") as context:
        visit = Visit(context, audit_page)
        dark = background(visit)
        visit.page.click("#theme")
        light = background(visit)
        visit.page.reload()
        assert background(visit) == light != dark
        visit.check()
    with browser.new_context(color_scheme="light") as context:
        visit = Visit(context, audit_page)
        assert background(visit) == light
        visit.page.click("#theme")
        assert background(visit) == dark
        visit.check()


def test_a_hundred_thousand_pairs_are_browsable(context, tmp_path):
    count = 100_000
    words = ["a large red ring", "two small blue squares", "on a brown background", "at the top", "in the centre"]
    texts = [f"{words[i % 5]} {words[i // 5 % 5]}, {words[i // 25 % 5]} {i:06}" for i in range(count)]
    path = write_page(tmp_path / "audit.html", table(count, texts), title="Many", facts=[], bad_rows=BadRows(1.0))
    assert path.stat().st_size < 150 * count
    begin = time.perf_counter()
    visit = Visit(context, path)
    expect(visit.page.locator("#list li")).to_have_count(50, timeout=30_000)
    opened = time.perf_counter() - begin
    begin = time.perf_counter()
    visit.page.fill("#text", "099999")
    expect(visit.page.locator("#list li")).to_have_count(1)
    filtered = time.perf_counter() - begin
    assert captions(visit) == texts[-1:]
    visit.page.click("#clear")
    visit.page.keyboard.press("Escape")
    visit.page.click("#status")
    visit.page.keyboard.press("End")
    assert captions(visit) == texts[-50:] and status(visit) == "99,951–100,000 of 100,000 pairs"
    assert visit.page.locator("#list img").count() == 0
    print(f"{path.stat().st_size / 1e6:.1f} MB, opened in {opened:.1f} s, filtered in {filtered:.1f} s")
    assert opened < 30 and filtered < 15  # seconds; far more than it takes on a machine that does nothing else
    visit.check()


def test_the_report_opens_and_shows_its_pairs(context, tmp_path):
    samples = [
        PairSample(number, SCRIPT if number == 3 else f"pair {number}", 20.0, image=Image.new("RGB", (40, 30), "red"))
        for number in range(8)
    ]
    run = RunSummary(
        f"dissect {SCRIPT}",
        {"strategy": "dissect", "final": {"recall_sum": 123.4}},
        log_history=[{"step": step, "loss": 4.0 - step} for step in range(3)],
        best_kept=samples[:5],
        worst_dropped=samples[5:],
    )
    visit = Visit(context, write_report(tmp_path / "report.html", [run], title=f"Report {SCRIPT}"))
    assert visit.page.title() == f"Report {SCRIPT}"
    assert visit.page.locator(".cards li").count() == 8
    assert visit.page.locator(".caption").nth(3).text_content() == SCRIPT
    for picture in visit.page.locator(".cards img").all():
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 40
    assert visit.page.locator("figure svg").count() == 1
    visit.page.click("nav a[href='#settings']")
    assert visit.page.url.endswith("#settings")
    assert [url for url in visit.requests if not url.startswith("data:")] == visit.requests[:1]
    visit.check()
