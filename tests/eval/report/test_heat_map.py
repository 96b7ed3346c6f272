"""Heat maps, against a luminance computed here another way, and against the shares they are made of."""

import html.parser
import itertools
import re

import numpy as np
import pytest

from moerec.eval.report.heat_map import N_LEVELS, draw_heat_map, find_contrast, mix_colours, pick_ink, write_heat_style


def luminance(colour):
    """WCAG 2.1's relative luminance, by matrix product over all channels at once."""
    value = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    linear = np.where(value <= 0.03928, value / 12.92, np.power((value + 0.055) / 1.055, 2.4))
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(first, second):
    high, low = max(luminance(first), luminance(second)), min(luminance(first), luminance(second))
    return (high + 0.05) / (low + 0.05)


def read_style():
    """{scheme: {level: (background, colour)}} of the rules."""
    light, dark = write_heat_style().split("@media (prefers-color-scheme: dark)")
    rule = re.compile(r"\.heat \.h(\d+) \{ background: (#\w{6}); color: (#\w{6}); \}")
    return {
        name: {int(level): (below, ink) for level, below, ink in rule.findall(part)}
        for name, part in (("light", light), ("dark", dark))
    }


class Cells(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.cells, self.heads, self.open, self.tags = [], [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.open = [dict(attrs), ""]
            (self.cells if tag == "td" else self.heads).append(self.open)

    def handle_endtag(self, tag):
        self.open = None if tag in ("td", "th") else self.open

    def handle_data(self, data):
        if self.open is not None:
            self.open[1] += data


ROWS = {"a": [k / 100 for k in range(0, 60, 3)], "b": [0.0, 1.0, 0.07, 0.49, 0.5, 0.51] + [0.2] * 14}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_digits_of_every_cell_stand_out(scheme):
    style = read_style()[scheme]
    assert sorted(style) == list(range(N_LEVELS))
    found = Cells(draw_heat_map(ROWS, [f"c{k}" for k in range(20)], "Shares"))
    assert len(found.cells) == 40
    for attributes, _ in found.cells:
        below, ink = style[int(re.match(r"h(\d+)", attributes["class"])[1])]
        assert contrast(below, ink) >= 4.5
    light = [luminance(style[level][0]) for level in range(N_LEVELS)]
    assert all((a > b) == (scheme == "light") for a, b in itertools.pairwise(light))


def test_every_background_has_an_ink():
    """Of greys, where black and white are hardest to tell from it, and of colours at random."""
    greys = [f"#{k:02x}{k:02x}{k:02x}" for k in range(256)]
    drawn = ["#" + bytes(row).hex() for row in np.random.default_rng(0).integers(0, 256, (300, 3), np.uint8)]
    for colour in greys + drawn:
        assert contrast(pick_ink(colour), colour) >= 4.5
        assert find_contrast("#ffffff", colour) == pytest.approx(contrast(colour, "#ffffff"), rel=1e-6)
    assert mix_colours("#000000", "#ffffff", 0.5) == "#808080"


def test_cells_hold_the_shares_and_their_names():
    found = Cells(draw_heat_map(ROWS, ["own"] * 2 + ["other"] * 18, "Shares"))
    assert [text for _, text in found.cells[20:24]] == ["0", "100", "7", "49"]
    assert found.cells[21][0]["title"] == "b, own 2: 100.0 %"
    assert int(re.match(r"h(\d+)", found.cells[21][0]["class"])[1]) == N_LEVELS - 1
    assert [(h["colspan"], text) for h, text in found.heads if "colspan" in h] == [("2", "own"), ("18", "other")]
    assert "100 %" in draw_heat_map(ROWS, ["x"] * 20, "Shares")


def test_names_that_are_long_are_turned_cut_and_told_in_full():
    name = "a service with a very long name indeed"
    found = Cells(draw_heat_map({name: [0.1, 0.2]}, [name, "<script>x</script>"], "<b>"))
    assert "script" not in found.tags
    assert found.heads[1][0]["title"] == name
    assert "turned" in found.heads[1][0]["class"]
    assert name.startswith(found.heads[1][1].removesuffix("…"))
    assert len(found.heads[1][1]) < len(name)
    assert "turned" not in draw_heat_map({"a": [0.1, 0.2]}, ["softmax", "own"], "Shares")


def test_nothing_is_shared():
    found = Cells(draw_heat_map({"a": [0.0, 0.0]}, ["x", "y"], "Shares"))
    assert [text for _, text in found.cells] == ["0", "0"]
    assert draw_heat_map({}, [], "Shares").startswith("<table")
