"""The server's page in a real headless Chromium, by the keyboard alone where it can be."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "integrations")]

from serving import serving, wait_until  # noqa: E402

import fastdllm  # noqa: E402
from fastdllm import text  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium (Debian: chromium)")

QUESTION = (
    "Tom has $500 and buys a lamp for $120 and a coat for $99. How many dollars does Tom have left?"
)

DEMO = (ROOT / "fastdllm/assets/demo.txt").read_text(encoding="utf-8").split("\n---\n")[2].strip()


@pytest.fixture(scope="module")
def loaded():
    return text.load("tiny-llada", "cpu")


@pytest.fixture(scope="module")
def served(loaded):
    with serving(loaded, positions=512, drain_seconds=1.0) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # In a container, where root runs it, Chromium's own sandbox does not start.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, served):
    """The page, and what it asked for and complained of."""
    found = browser.new_page(viewport={"width": 1000, "height": 760})
    found.asked, found.complaints = [], []
    found.on("request", lambda request: found.asked.append(request.url))
    found.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.on("console", lambda message: found.complaints.append(message.text))
    found.goto(served.address)
    yield found
    found.close()


def until(page, holds, seconds=30.0):
    """Wait for a JavaScript expression; Playwright's own way would evaluate texts in the page,
    which its policy forbids.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(holds):
        assert time.monotonic() < end, f"never: {holds}"
        page.wait_for_timeout(20)


def expected(loaded, **options):
    """(text, tokens, forwards) of `generate`."""
    ids = loaded.encode(QUESTION)
    done = fastdllm.generate(loaded.model, [ids], gen_length=128, **options)
    written = loaded.written(done.tokens[0][len(ids) :])
    return loaded.decode(written), len(written), int(done.nfe)


def test_a_prompt_is_typed_cells_fill_and_the_answer_is_generates(loaded, page, served):
    answer, tokens, forwards = expected(loaded)
    page.keyboard.type(QUESTION)  # the prompt has the focus
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.answer')?.textContent")
    assert page.text_content(".answer") == answer and "#### 281" in answer
    figures = page.text_content(".figures")
    assert figures.startswith(f"{tokens} tokens, {forwards} forwards, ")
    assert page.locator(".canvas span").count() == 128 and page.locator(".mask").count() == 0
    spelled = page.eval_on_selector_all(".canvas span", "cells => cells.map(c => c.textContent)")
    assert "".join(spelled[:tokens]) == answer and set(spelled[tokens:]) == {"·"}
    assert page.locator(".sure").count() > tokens / 2
    assert "confidence" in page.locator(".canvas span").first.get_attribute("title")
    assert page.complaints == []
    assert page.asked and all(url.startswith((served.address, "data:")) for url in page.asked)


def test_vanilla_runs_beside_it_and_shows_how_it_fills(loaded, page):
    wanted = expected(loaded, cache="none", rule=fastdllm.Quota(32))
    page.evaluate(WATCH)
    page.keyboard.type(QUESTION)
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "vanilla"
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    until(page, "[...document.querySelectorAll('.answer')].filter(a => a.textContent).length === 2")
    assert page.locator(".answer").nth(1).text_content() == wanted[0]
    figures = page.locator(".figures").nth(1).text_content()
    assert figures.startswith(f"{wanted[1]} tokens, {wanted[2]} forwards, ")
    seen = page.evaluate("seen")
    masks = [masked for masked, _ in seen]
    assert masks == sorted(masks, reverse=True) and len(set(masks)) > 20
    assert {active for _, active in seen} >= {"0", "1"}


# After every change of the second canvas: how many cells are masked, and which block is framed.
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const canvas = document.querySelectorAll('.canvas')[1];
    if (!canvas?.children.length) return;
    const active = [...canvas.children].findIndex(b => b.classList.contains('active'));
    window.seen.push([canvas.querySelectorAll('.mask').length, String(active)]);
  }).observe(document.getElementById('runs'), {subtree: true, childList: true, attributes: true});
}"""


def test_escape_stops_and_the_row_is_free(page, served):
    page.fill("#prompt", QUESTION)
    page.fill("#tokens", "400")
    page.check("#vanilla")
    page.press("#prompt", "Enter")
    until(page, "document.querySelectorAll('.canvas span:not(.mask)').length > 5")
    page.keyboard.press("Escape")
    wait_until(lambda: served.service.vanilla_engine().stats()["busy"] == 0)
    until(page, "document.getElementById('stop').disabled")
    assert page.text_content("#alert") == "" and page.locator(".mask").count() > 0


def test_what_is_refused_is_shown(page):
    page.fill("#prompt", QUESTION)
    page.fill("#tokens", "5000")
    page.press("#prompt", "Enter")
    until(page, "document.getElementById('alert').textContent")
    assert page.text_content("#alert").startswith("max_tokens: ")


def test_a_key_is_asked_for(loaded, browser):
    with serving(loaded, rows=1, positions=512, key="a-secret") as locked:
        page = browser.new_page()
        page.goto(locked.address)
        assert not page.is_visible("#key")
        page.fill("#prompt", QUESTION)
        page.press("#prompt", "Enter")
        page.wait_for_selector("#key", state="visible")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("a-secret")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('.answer')?.textContent")
        assert page.text_content("#alert") == ""
        page.close()


def test_the_server_goes_away(loaded, browser):
    with serving(loaded, rows=1, positions=512, drain_seconds=0.0) as leaving:
        page = browser.new_page()
        page.goto(leaving.address)
        page.fill("#prompt", QUESTION)
        page.fill("#tokens", "400")
        page.check("#vanilla")
        page.press("#prompt", "Enter")
        until(page, "document.querySelectorAll('.canvas span:not(.mask)').length > 5")
        leaving.service.close()
        until(page, "document.getElementById('alert').textContent")
    page.press("#prompt", "Enter")
    until(page, "document.getElementById('alert').textContent === 'The server has gone away.'")
    page.close()


def test_a_picture_of_both_runs(page, tmp_path):
    """SCREENSHOT names the file where it goes: the README's is fastdllm/serve/page.png."""
    page.set_viewport_size({"width": 960, "height": 610})
    page.fill("#prompt", DEMO)
    page.check("#vanilla")
    page.press("#prompt", "Enter")
    until(page, "document.querySelectorAll('section:last-child .canvas .sure').length > 42")
    file = Path(os.environ.get("SCREENSHOT", tmp_path / "page.png"))
    page.screenshot(path=file)
    assert 10_000 < file.stat().st_size < 150_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser, served, scheme):
    """Contrast of at least 4.5 between the text and what is behind it, cells included."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(served.address)
    colours = page.evaluate(COLOURS)
    dark = luminance(colours["page"]) < 0.5
    assert dark == (scheme == "dark")
    for name in ("page", "field", "sure", "likely", "maybe", "unsure"):
        assert contrast(colours["ink"], colours[name]) >= 4.5, name
    assert contrast(colours["dim"], colours["page"]) >= 4.5
    assert contrast(colours["alert"], colours["page"]) >= 4.5
    assert contrast(colours["frame"], colours["page"]) >= 3
    page.close()


COLOURS = """() => {
  const names = ['page', 'ink', 'dim', 'field', 'frame', 'sure', 'likely', 'maybe', 'unsure',
    'alert'];
  const probe = document.body.appendChild(document.createElement('i'));
  return Object.fromEntries(names.map(name => {
    probe.style.color = `var(--${name})`;
    return [name, getComputedStyle(probe).color.match(/\\d+/g).map(Number)];
  }));
}"""


def luminance(colour):
    """Relative luminance, as WCAG 2 defines it."""
    parts = [value / 255 for value in colour]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
