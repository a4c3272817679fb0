"""The page of a run as a reader sees it in a real browser, while the run writes."""

import json

import pytest
from testing.browser import Visit, chromium, expect
from testing.watched_runs import make_live, make_log, make_run, serving

from hf_dissect.report.live import LOG_FILE, append_log

pytestmark = pytest.mark.usefixtures("drawn")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "<a href='javascript:alert(3)'>here</a>",
    "</style></script><svg onload=alert(4)><iframe src=javascript:alert(5)>",
    "{{ 7 * 7 }} {% raw %} \u202e\u0000\ud800",
    "![x](http://evil.example/x.png)",
)
LATER = 10_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def context(browser):
    with browser.new_context(viewport={"width": 1000, "height": 700}) as made:
        yield made


def draw_at_once(server) -> None:
    """Let the next request draw the page, however long the last drawing took."""
    server.drawer._due = 0.0


def test_the_page_renews_itself_in_place(tmp_path, context):
    folder = make_run(tmp_path / "run", captions=("a dog", "a cat"), metrics={"settings": {"seed": 1}})
    with serving(folder) as server:
        visit = Visit(context, server.url)
        page = visit.page
        expect(page.locator("#status")).to_have_text("Training: step 30 of 100, epoch 0.50.")
        expect(page.locator("#age")).to_contain_text("Last written", timeout=LATER)
        page.locator("summary").first.click()
        page.evaluate("window.scrollTo(0, 600)")
        page.evaluate("document.querySelector('.cards img').kept = true")
        at = page.evaluate("window.scrollY")
        assert at > 300
        append_log(folder, make_log(40, eval_recall_sum=12.5))
        make_live(captions=("a dog", "a bird"), step=40, metrics={"settings": {"seed": 1}}).save(folder)
        draw_at_once(server)
        expect(page.locator("#status")).to_contain_text("step 40 of 100", timeout=LATER)
        expect(page.locator(".cards .caption").nth(1)).to_have_text("a bird")
        # What did not change is the same element, what was opened is open, and nothing moved.
        assert page.evaluate("document.querySelector('.cards img').kept === true")
        assert page.locator("details").first.get_attribute("open") is not None
        assert abs(page.evaluate("window.scrollY") - at) < 2
        assert page.locator("figure svg").count() >= 3
        visit.check()


def test_nothing_of_the_run_acts_in_the_page(tmp_path, context):
    fields = {"title": HOSTILE[0], "state": "stopped", "reason": HOSTILE[1]}
    metrics = {"name": HOSTILE[3], "settings": {HOSTILE[1]: HOSTILE[2]}, "strategy": HOSTILE[0]}
    metrics["alerts"] = [{"step": 1, "subject": "x", "title": HOSTILE[1], "text": HOSTILE[3]}]
    folder = make_run(tmp_path / "<img src=x onerror=alert(6)>", captions=HOSTILE, metrics=metrics, **fields)
    with serving(folder) as server:
        visit = Visit(context, server.url)
        expect(visit.page.locator(".cards .caption").nth(0)).to_have_text(HOSTILE[0])
        make_live(captions=HOSTILE[::-1], metrics=metrics, **fields).save(folder)  # renewed by the script, too
        draw_at_once(server)
        expect(visit.page.locator(".cards .caption").nth(5)).to_have_text(HOSTILE[0], timeout=LATER)
        assert visit.page.evaluate("document.querySelectorAll('iframe, [onerror], [onload], [src^=x]').length") == 0
        assert visit.page.evaluate("[...document.links].every((link) => /^https?:/.test(link.href))")
        visit.check()


def test_another_page_can_neither_frame_nor_read_it(tmp_path, context):
    with serving(make_run(tmp_path)) as server, serving(make_run(tmp_path / "other")) as other:
        page = Visit(context, other.url).page
        # The policy of our own page forbids it to ask elsewhere, so that a bare page asks.
        page.goto("about:blank")
        assert page.evaluate("(url) => fetch(url).then(() => 'read', () => 'refused')", server.url) == "refused"
        page.set_content(f'<iframe src="{server.url}"></iframe>')
        page.wait_for_timeout(300)
        assert all(
            "mine: dissect" not in (frame.content() if frame != page.main_frame else "") for frame in page.frames
        )


def test_a_run_that_begins_and_ends_and_a_server_that_ends(tmp_path, context):
    folder = make_run(tmp_path / "run", steps=0, step=0, epoch=0.0)
    with serving(folder) as server:
        page = Visit(context, server.url).page
        expect(page.locator("main")).to_contain_text("Nothing was logged yet.")
        with open(folder / LOG_FILE, "a") as opened:
            opened.write(json.dumps(make_log(10)) + '\n{"step": 20, "lo')
        draw_at_once(server)
        expect(page.locator("#status")).to_contain_text("step 10 of 100", timeout=LATER)
        (folder / "metrics.json").write_text(json.dumps({"name": "dissect", "strategy": "dissect", "final": {}}))
        draw_at_once(server)
        expect(page.locator("#status")).to_have_text("Finished.", timeout=LATER)
    expect(page.locator("#age")).to_contain_text("does not answer", timeout=LATER)
    expect(page.locator("#status")).to_have_text("Finished.")
