"""The page of a report in a real browser: what the cut moves, what is found, what is copied, what is never executed."""

import json
import shutil
import time

import datasets
import numpy as np
import pytest
from reports import EVIL, NAMES, NAN, images_of, table_of

from hf_mimic import attach_scores
from hf_mimic.report import build_report
from hf_mimic.report_options import ReportOptions

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra test)")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not CHROMIUM or not DRIVER, reason=f"no browser: chromium is {CHROMIUM}, chromedriver is {DRIVER}"
)

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --force-prefers-reduced-motion --hide-scrollbars --disable-dev-shm-usage --disable-extensions --window-size=1280,900""".split()
ROWS = 120


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def scored():
    """Return a data set and its scores: row i has label i % 3; a tenth has no score; row 7 has an evil caption."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=ROWS)
    scores[::10] = NAN
    captions = [f"picture of {NAMES[i % 3]} number {i}" for i in range(ROWS)]
    captions[7] = EVIL
    return images_of([i % 3 for i in range(ROWS)], captions=captions), table_of(scores, epochs=2)


@pytest.fixture(scope="module")
def written(scored, tmp_path_factory):
    rows, table = scored
    patch = pytest.MonkeyPatch()
    patch.setattr("hf_mimic.report.draw_figures", lambda *_: [])
    options = ReportOptions(title=f"Scores {EVIL}", max_images=40)
    keep = np.arange(ROWS) % 4 > 0
    quality = {"a": {"noise": 0.0, "noise_rate": 0.1, "noise_low": 0.0, "noise_high": 0.2}}
    yield build_report(
        table,
        tmp_path_factory.mktemp("report"),
        dataset=rows,
        filters={"a": keep, "b": ~keep, "c": np.arange(ROWS) % 2 > 0},
        compare=quality | {"b": {name: value + 0.3 for name, value in quality["a"].items()}},
        health={
            "steps": [{"step": i, "score_fit_correlation": 0.1 * i} for i in range(5)],
            "score_fit_correlation": 0.4,
        },
        options=options,
    )
    patch.undo()


@pytest.fixture
def page(browser, written):
    """Open the page anew; afterwards there must be no message in the console and no request but for the file."""
    browser.get_log("performance")
    browser.get(written.html.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    urls = {m["request"]["url"] for m in asked if not m["documentURL"].startswith("chrome")}  # of the empty first tab
    assert {url for url in urls if not url.startswith("data:")} == {written.html.as_uri()}
    assert browser.execute_script("return document.title") == f"Scores {EVIL}"
    assert browser.execute_script("return document.querySelectorAll('script').length") == 2


def by_id(page, name):
    return page.find_element(By.ID, name)


def text(page, name):
    return by_id(page, name).get_attribute("textContent")


def set_value(page, name, value, event="input"):
    page.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event(arguments[2]))",
        name,
        value,
        event,
    )


def click(page, element):
    """Click what may stand under the bar of sections: WebDriver scrolls no further than it must."""
    page.execute_script("arguments[0].click()", element)


def scores_of(table):
    return table.aggregate()["mimic_score"].to_numpy().astype(float)


def until(check, seconds=5):
    """Wait for what the page does a moment later."""
    end = time.monotonic() + seconds
    while not (done := check()) and time.monotonic() < end:
        time.sleep(0.02)
    assert done


def shown(page, name="page"):
    """Return the ids of the cards in a list."""
    ids = "return [...document.getElementById(arguments[0]).querySelectorAll('.id')].map(e => e.textContent)"
    return [int(one[1:]) for one in page.execute_script(ids, name)]


def see(page, name):
    """Scroll there: what follows the cut is drawn when it is seen."""
    page.execute_script("document.getElementById(arguments[0]).scrollIntoView({behavior: 'instant'})", name)
    drawn = """const at = document.getElementById(arguments[0]);
    return panels.some(p => p.visible && !p.stale && (p.node.contains(at) || at.contains(p.node)))"""
    until(lambda: page.execute_script(drawn, name))


@pytest.mark.parametrize("cut", [-3, -0.5, 0, 0.3, 1.25, 9])
def test_counts_equal_numpys(page, scored, cut):
    set_value(page, "value", cut)
    keep = ~(scores_of(scored[1]) < cut)
    assert (text(page, "kept"), text(page, "dropped")) == (str(keep.sum()), str((~keep).sum()))
    assert text(page, "kept-share") == f"{100 * keep.mean():.1f} %"
    see(page, "by-class")
    cells = [e.get_attribute("textContent") for e in page.find_elements(By.CSS_SELECTOR, "#by-class .kept-cell")]
    assert cells == [str(keep[c::3].sum()) for c in range(3)]


def test_the_slider_moves_everything(page, scored):
    score = scores_of(scored[1])
    for place in (0, 137, 500, 999, 1000):
        set_value(page, "slider", place)
        cut = float(by_id(page, "value").get_attribute("value"))
        keep = ~(score < cut)
        assert text(page, "kept") == str(keep.sum())
        assert f"s >= {by_id(page, 'value').get_attribute('value')}," in text(page, "line")
        if place == 0:
            assert keep.all()
        if place == 1000:
            assert (keep & np.isfinite(score)).sum() == 1


def test_the_share_to_drop(page, scored):
    score = scores_of(scored[1])
    for share in (0, 25, 50, 100):
        set_value(page, "percent", share)
        cut = float(by_id(page, "value").get_attribute("value"))
        known = np.isfinite(score)
        assert (score[known] < cut).sum() == round(share / 100 * known.sum())


def test_the_nearest_samples(page, scored):
    score = scores_of(scored[1])
    set_value(page, "value", 0.2)
    see(page, "below")
    page.execute_script("document.getElementById('pictured').click()")
    order = np.argsort(score)[: np.isfinite(score).sum()]
    place = (score < 0.2).sum()
    assert shown(page, "below") == order[place - 6 : place][::-1].tolist()
    assert shown(page, "above") == order[place : place + 6].tolist()
    page.execute_script("document.getElementById('pictured').click()")
    images = page.find_elements(By.CSS_SELECTOR, "#below img, #above img")
    assert len(images) == 12
    assert all(page.execute_script("return arguments[0].naturalWidth", image) == 20 for image in images)


@pytest.mark.parametrize("drop", [False, True])
def test_the_line_does_what_the_page_counts(page, scored, drop):
    rows, table = scored
    set_value(page, "value", 0.137)
    if drop:
        page.execute_script("document.getElementById('drop-nulls').click()")
    with pytest.warns(UserWarning, match="12 of 120 rows have no score"):
        names = {"scored": attach_scores(rows, table)}
    exec(text(page, "line"), names)
    assert text(page, "kept") == str(len(names["curated"]))
    nulls = sum(score is None for score in names["curated"]["mimic_score"])
    assert nulls == (0 if drop else 12)
    assert text(page, "meaning") == f"Rows without a score are {'dropped' if drop else 'kept'}."


def test_copy(page):
    page.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    by_id(page, "copy").click()
    until(lambda: text(page, "copied") == "Copied.")
    copied = page.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == text(page, "line")
    assert copied.startswith("curated = scored.filter(lambda s: s is None or s >= 0, input_columns=")


def test_copy_in_a_frame_that_may_not(page):
    page.execute_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    by_id(page, "copy").click()
    until(lambda: text(page, "copied") in ("Copied.", "Not copied: the line is selected, press Ctrl+C."))
    assert page.execute_script("return getSelection().toString()") == text(page, "line")


def test_search(page, scored):
    score = scores_of(scored[1])
    see(page, "page")
    for words, ids in {"number 33": [33], "#5": [5], "bee": range(1, ROWS, 3), "ANT 99": [99], "nothing": []}.items():
        set_value(page, "search", words)
        wanted = sorted(ids, key=lambda i: (np.isnan(score[i]), score[i]))
        until(lambda w=wanted: shown(page) == w[:24])
        assert text(page, "found").startswith(f"{len(wanted)} of {ROWS} samples")


def test_views_order_and_pages(page, scored):
    score = scores_of(scored[1])
    order = [*np.argsort(score)[: np.isfinite(score).sum()].tolist(), *np.flatnonzero(np.isnan(score)).tolist()]
    dropped = [i for i in order if score[i] < 0]
    views = {"dropped": dropped, "kept": [i for i in order if i not in dropped], "unscored": order[-12:], "all": order}
    see(page, "samples")
    for view, wanted in views.items():
        click(page, page.find_element(By.CSS_SELECTOR, f"[data-view={view}]"))
        seen, pages = [], int(text(page, "pages"))
        for _ in range(pages):
            seen += shown(page)
            if by_id(page, "next").is_enabled():
                click(page, by_id(page, "next"))
        assert sorted(seen) == sorted(wanted)
        scored_part = [i for i in seen if np.isfinite(score[i])]
        assert scored_part == [i for i in wanted if np.isfinite(score[i])]
    set_value(page, "order", "down", "change")
    assert [i for i in shown(page) if np.isfinite(score[i])] == [i for i in order[::-1][:24] if np.isfinite(score[i])]
    click(page, by_id(page, "last"))
    assert shown(page)[-1] == order[0]
    set_value(page, "number", "2", "change")
    assert sorted(shown(page)) == sorted(order[::-1][24:48])


def test_data_are_shown_and_never_executed(page):
    see(page, "page")
    set_value(page, "search", "#7")
    until(lambda: shown(page) == [7])
    caption = page.find_element(By.CSS_SELECTOR, "#page .caption")
    assert caption.get_attribute("textContent") == EVIL
    assert page.find_elements(By.CSS_SELECTOR, "#page b:not(.score), img[onerror]") == []
    assert page.find_element(By.TAG_NAME, "h1").get_attribute("textContent") == f"Scores {EVIL}"


def test_the_policy_stops_what_is_not_of_the_package(browser, written):
    """The negative control of the one above: even markup that got in would not run."""
    browser.get(written.html.as_uri())
    browser.execute_script(
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"document.title=1\">')"
    )
    until(lambda: any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser")))
    assert browser.execute_script("return document.title") == f"Scores {EVIL}"


def test_by_keyboard_alone(page):
    """Tab reaches every control, in order, with a visible focus; arrows move the cut."""
    reached = []
    for _ in range(200):
        page.switch_to.active_element.send_keys(Keys.TAB)
        element = page.switch_to.active_element
        reached.append(element.get_attribute("id"))
        if reached[-1] == "slider":
            before = text(page, "kept")
            element.send_keys(Keys.PAGE_UP, Keys.ARROW_RIGHT)
            assert text(page, "kept") != before
            assert element.get_attribute("aria-valuetext").endswith(f"{text(page, 'kept-share')}")
            style = page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", element)
            assert style == "solid"
        if reached[-1] == "next":
            break
    wanted = [
        "theme",
        "slider",
        "value",
        "percent",
        "reset",
        "drop-nulls",
        "line",
        "copy",
        "pictured",
        "search",
        "order",
    ]
    assert [name for name in reached if name in wanted] == wanted
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert by_id(page, "number").get_attribute("value") == "2"
    until(lambda: text(page, "status") == f"{text(page, 'kept')} kept, {text(page, 'dropped')} dropped")


def test_every_control_has_a_name_and_every_table_its_heads(page):
    bare = """return [...document.querySelectorAll('input, select, button')].filter(e =>
        !(e.labels && e.labels.length) && !e.textContent.trim() && !e.getAttribute('aria-label')).map(e => e.id)"""
    assert page.execute_script(bare) == []
    assert page.execute_script("return [...document.querySelectorAll('th')].filter(e => !e.scope).length") == 0
    assert page.execute_script("return document.querySelectorAll('th[scope=row]').length") > 6
    assert page.execute_script("return document.querySelectorAll('img:not([alt])').length") == 0


CONTRAST = """
const light = (c) => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const rgba = (c, under) => { context.fillStyle = `rgb(${under.join(' ')})`; context.fillRect(0, 0, 1, 1);
  context.fillStyle = c; context.fillRect(0, 0, 1, 1); return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3); };
const back = (e) => { const chain = []; for (; e; e = e.parentElement) chain.push(getComputedStyle(e).backgroundColor);
  return chain.reverse().reduce((under, c) => rgba(c, under), [255, 255, 255]); };
const bad = [];
for (const e of document.querySelectorAll('body *')) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.closest('script, noscript, option')) continue;
  if (!e.checkVisibility() || e.disabled) continue;
  const style = getComputedStyle(e), svg = e.closest('svg'), under = back(svg ? svg.parentElement : e);
  const a = light(rgba(svg ? style.fill : style.color, under)), b = light(under);
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < 4.5) bad.push([e.tagName, e.className.toString(), e.textContent.slice(0, 20), ratio]);
}
return bad"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_light_and_dark_wide_and_narrow(page, theme, width):
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        back = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert back == {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 19, 23)"}[theme]
        assert page.execute_script("return document.documentElement.scrollWidth") == width
        assert page.execute_script(CONTRAST) == []
        other = {"light": "dark", "dark": "light"}[theme]
        set_value(page, "theme", other, "change")
        assert page.execute_script("return getComputedStyle(document.body).backgroundColor") != back
        page.refresh()
        assert by_id(page, "theme").get_attribute("value") == other
        set_value(page, "theme", "", "change")
        assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == back
    finally:
        page.execute_script("localStorage.clear()")
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("scores", [[0.5] * 4, [1.0, -1.0], [0.25], [NAN, 1e-9, 2e-9], [1e9, -1e9, 0.0, NAN]])
def test_scores_of_every_kind(browser, tmp_path, monkeypatch, scores):
    monkeypatch.setattr("hf_mimic.report.draw_figures", lambda *_: [])
    report = build_report(table_of(scores, shift=0), tmp_path)
    browser.get_log("browser")
    browser.get(report.html.as_uri())
    known = np.float32(scores)[np.isfinite(scores)].astype(float)
    for place in (0, 250, 500, 1000):
        set_value(browser, "slider", place)
        cut = float(by_id(browser, "value").get_attribute("value"))
        assert text(browser, "dropped") == str((known < cut).sum())
    assert "NaN" not in browser.find_element(By.TAG_NAME, "body").text
    assert browser.get_log("browser") == []


MEASURE = """
const slider = document.getElementById('slider'), times = [];
for (let i = 0; i <= 100; i++) {
  const start = performance.now();
  slider.value = 10 * ((i * 37) % 101);
  slider.dispatchEvent(new Event('input'));
  document.body.getBoundingClientRect();  // with the layout
  times.push(performance.now() - start);
}
return times"""


@pytest.mark.slow
def test_25000_samples_answer_at_once(browser, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mimic.report.draw_figures", lambda *_: [])
    size = 25_000
    names = [f"class {i}" for i in range(100)]
    captions = [f"a photograph of thing number {i}, and some more words about it" for i in range(size)]
    one = images_of([0] * 500)["image"]
    kind = datasets.ClassLabel(names=names)
    rows = images_of([i % 100 for i in range(size)], captions=captions, kind=kind, pictures=[*one] * 50)
    report = build_report(table_of(np.random.default_rng(0).normal(size=size)), tmp_path, dataset=rows)
    assert report.html.stat().st_size < 15e6
    browser.get(report.html.as_uri())
    for place in ("cut", "samples", "by-class"):
        see(browser, place)
        times = browser.execute_script(MEASURE)
        assert np.quantile(times, 0.95) < 100, f"{place}: median {np.median(times):.1f} ms, most {max(times):.1f} ms"
    see(browser, "page")
    set_value(browser, "search", "number 24999,")
    until(lambda: shown(browser) == [24999])
