"""The page as Chromium lays it out, at the width of a desk and of a telephone; skipped where there is none."""

import pytest

from moerec.config import AskConfig, MoEConfig, PersonalConfig
from moerec.eval.report import write_report
from moerec.files import to_plain
from tests.eval.report.browser import find_browser, open_browser
from tests.eval.report.test_parts_of_the_page import item, make_example
from tests.eval.test_report import add_tests, full_metrics, make_run, result

SERVICES = ("groceries and household", "marketplace", "pharmacy", "restaurants near by", "тревел", "电影和音乐")
WIDTHS = (1400, 390)

# What is wrong with the page, in words.
CHECK = """(() => {
  const wrong = [], root = document.documentElement;
  if (root.scrollWidth > window.innerWidth) wrong.push(`the page is ${root.scrollWidth} wide`);
  const rects = (query, top) => [...top.querySelectorAll(query)].map(x => [x.textContent, x.getBoundingClientRect()]);
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > .5
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > .5;
  for (const heat of document.querySelectorAll('table.heat')) {
    const texts = [...heat.querySelectorAll('th, td')].filter(x => x.textContent).map(x => {
      const range = document.createRange(); range.selectNodeContents(x);
      return [x.textContent, range.getBoundingClientRect()]; });
    for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++)
      if (meet(texts[i][1], texts[j][1])) wrong.push(`${texts[i][0]} meets ${texts[j][0]}`);
  }
  for (const picture of document.querySelectorAll('svg')) {
    const frame = picture.getBoundingClientRect(), texts = rects('text', picture);
    for (const [text, r] of texts)
      if (r.right > frame.right + 1 || r.left < frame.left - 1) wrong.push(`${text} is out`);
    for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
      const a = texts[i][1], b = texts[j][1], deep = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (meet(a, b) && deep > .35 * Math.min(a.height, b.height)) wrong.push(`${texts[i][0]} meets ${texts[j][0]}`);
    }
  }
  for (const table of document.querySelectorAll('main table'))
    if (table.offsetParent && !table.closest('.scroll')) wrong.push('a table has no box to scroll in');
  return wrong;
})()"""

# Contrast of the digits of every cell of heat maps with what the browser paints, by WCAG's formula.
CONTRAST = """Math.min(...[...document.querySelectorAll('table.heat td')].map(cell => {
  const style = getComputedStyle(cell), light = text => {
    const x = text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * x[0] + .7152 * x[1] + .0722 * x[2] + .05; };
  const a = light(style.color), b = light(style.backgroundColor);
  return Math.max(a, b) / Math.min(a, b); }))"""

# Of the main table: whether it scrolls, whether its first column stays, and what is painted at its edge.
STICKY = """(() => {
  const box = document.querySelector('.scroll'), head = box.querySelector('tbody th');
  box.scrollLeft = 120;
  const gap = head.getBoundingClientRect().left - box.getBoundingClientRect().left;
  return [box.scrollWidth > box.clientWidth, box.scrollLeft, gap, getComputedStyle(box).backgroundImage];
})()"""


def crowded_metrics():
    """A run with many services and experts, all parts of the model, long names, and a request."""
    metrics = full_metrics()
    metrics["test"], metrics["ceiling"] = result(0.1, SERVICES), result(0.14, SERVICES)
    metrics["baselines"] = {
        name: result(0.08, SERVICES) for name in ("popularity", "item_knn", "a_" + "long_name_" * 6)
    }
    metrics = add_tests(metrics)
    config = metrics["config"]
    config["model"]["moe"] = to_plain(MoEConfig(layers=(1,), n_per_group=4, d_shared=32))
    config["model"]["ask"] = to_plain(AskConfig(from_layer=1))
    config["model"]["personal"] = to_plain(PersonalConfig(layers=(1,)))
    config["model"] |= {"pointer": "services", "text_pointer": True, "transition_pointer": True}
    config["data"] |= {"text_neighbors": 64, "transition_neighbors": 64}
    metrics["dataset"]["services"] = list(SERVICES)
    load = [[((3 * z + e) % 29) / 29 for e in range(28)] for z in range(6)]
    metrics["routing"] = {"load": load, "dropped": 0, "max_over_mean": 1.5, "analyser": {"macro_f1": 0.5}}
    weights = [[0.5, 0.1, 0.1, 0.1, 0.2]] * 6
    metrics["probes"] = {
        "mixture_weights": weights,
        "mixture_components": ["softmax", "own", "shared", "text", "transitions"],
    }
    paired = {"difference": 0.05, "interval": [0.01, 0.09], "p_value": 0.01}
    metrics["paired"] = {
        name: {**paired, "in_service": dict.fromkeys(SERVICES, paired)} for name in metrics["baselines"]
    }
    metrics["baseline_sizes"] = {"popularity": {"n_stored": 1801, "seconds": 0.5}}
    metrics["baseline_settings"] = {"item_knn": {"days": 30, "history": "own", "decay": 0.7}}
    answer = {"weight": 0.2, "components": {"softmax": 0.5, "own": 0.5}, "items": [item(k, 0.1) for k in range(5)]}
    metrics["example"] = {**make_example(), "services": dict.fromkeys(SERVICES, answer)}
    metrics["example"]["domain"] = dict.fromkeys(SERVICES, 1 / 6)
    return metrics


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with open_browser(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("page") / "run", crowded_metrics()))


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_nothing_collides_nor_runs_out_of_the_page(browser, page, width, scheme):
    browser.open(page, width, scheme)
    assert browser.evaluate("window.innerWidth") == width
    browser.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true; })")
    assert browser.evaluate("document.querySelectorAll('table.heat td').length") == 6 * 28 + 6 * 5
    assert browser.evaluate("document.querySelectorAll('svg.model text').length") > 30
    assert browser.evaluate(CHECK) == []
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.errors == []


def test_a_wide_table_scrolls_in_its_box_under_a_first_column_that_stays(browser, page):
    browser.open(page, 390)
    is_wide, scrolled, gap, painted = browser.evaluate(STICKY)
    assert is_wide
    assert scrolled == 120
    assert abs(gap) < 1
    assert painted.count("linear-gradient") == 4


def test_what_collides_is_found(browser, tmp_path):
    """The checks themselves, on a page that is wrong in every way."""
    cells = '<th style="position:absolute;left:0">one</th><td style="position:absolute;left:3px">two</td>'
    wide = '<p style="width:3000px">wide</p>'
    drawn = '<svg width="80" height="30"><text x="0" y="20">three</text><text x="9" y="20">four</text></svg>'
    path = tmp_path / "wrong.html"
    path.write_text(f'<main><table class="heat"><tr>{cells}</tr></table>{wide}{drawn}</main>')
    browser.open(path, 1400)
    found = " ".join(browser.evaluate(CHECK))
    for words in ("wide", "two meets one", "four meets three", "no box"):
        assert words in found
