"""A heat map as a table, whose headings the browser lays out so that none meets another, and whose digits can be read.

A cell has one of `N_LEVELS` colours; that of its digits is the page's ink or paper, whichever stands out against it,
and black or white where neither does (contrast by WCAG 2.1, https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio).
"""

import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

from moerec.config.terminal import printable

N_LEVELS = 21
LEAST_CONTRAST = 4.5  # WCAG 2.1, AA, of text in body size
_RAMPS = {"light": ("#eef3f5", "#0b4f69"), "dark": ("#1d262d", "#9fdcf2")}  # the smallest share and the largest
_INKS = ("#1d2730", "#fdfdfb", "#000000", "#ffffff")
_LONGEST, _LONGEST_ROW = 22, 26  # letters of a heading; the title has all of it
_FEW = 12  # columns, whose cells are wider
_CELL, _WIDE_CELL, _LETTER = 34, 68, 8  # CSS pixels of a cell and, at most, of a letter
_MOST_DIGITS = 64  # columns, beyond which cells have no digits, but titles


def draw_heat_map(rows: Mapping[str, Sequence[float]], columns: Sequence[str], title: str) -> str:
    """A table of shares in %, the stronger the colour the larger, with their scale below.

    Equal neighboring columns are a group: their heading is written once, over numbers from 1.
    """
    most = max((share for shares in rows.values() for share in shares), default=0)
    groups = [(name, len(list(members))) for name, members in groupby(columns)]
    numbers = [(name, n, size) for name, size in groups for n in range(1, size + 1)]
    kind, cell = ("heat few", _WIDE_CELL) if len(columns) <= _FEW else ("heat", _CELL)
    lines = [f'<table class="{kind}" aria-label="{escape(printable(title))}">', "<thead>", _draw_heads(groups, cell)]
    if any(size > 1 for _, size in groups) and len(columns) <= _MOST_DIGITS:
        heads = (f"<th{_edge(n)}>{n if size > 1 else ''}</th>" for _, n, size in numbers)
        lines.append(f"<tr><th></th>{''.join(heads)}</tr>")
    lines += ["</thead>", "<tbody>"]
    for label, shares in rows.items():
        cells = []
        for (name, n, size), share in zip(numbers, shares, strict=True):
            level = round((N_LEVELS - 1) * share / most) if most > 0 else 0
            column = f"{name} {n}" if size > 1 else name
            digits = f"{100 * share:.0f}" if len(columns) <= _MOST_DIGITS else ""
            of_cell = escape(printable(f"{label}, {column}: {100 * share:.1f} %"))
            cells.append(f'<td class="h{level}{" edge" * (n == 1)}" title="{of_cell}">{digits}</td>')
        head = _head(label, _LONGEST_ROW, ' scope="row"')
        lines.append(f"<tr>{head}{''.join(cells)}</tr>")
    swatches = "".join(f'<i class="h{level}"></i>' for level in range(0, N_LEVELS, 2))
    lines += ["</tbody>", "</table>", f'<p class="scale heat">0 {swatches} {100 * most:.0f} %</p>']
    return "\n".join(lines)


def write_heat_style() -> str:
    """The rules of style of all levels, in light and in dark."""

    def write(ramp: tuple[str, str]) -> str:
        colours = (mix_colours(*ramp, level / (N_LEVELS - 1)) for level in range(N_LEVELS))
        return "\n".join(
            f".heat .h{level} {{ background: {colour}; color: {pick_ink(colour)}; }}"
            for level, colour in enumerate(colours)
        )

    return f"{write(_RAMPS['light'])}\n@media (prefers-color-scheme: dark) {{\n{write(_RAMPS['dark'])}\n}}"


def mix_colours(low: str, high: str, share: float) -> str:
    """Between two colours `#rrggbb`, in sRGB."""
    pairs = zip(_read_colour(low), _read_colour(high), strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def pick_ink(background: str) -> str:
    """The first of the inks with `LEAST_CONTRAST`; black or white always has it."""
    return next(ink for ink in _INKS if find_contrast(ink, background) >= LEAST_CONTRAST)


def find_contrast(first: str, second: str) -> float:
    """The ratio of contrast of two colours, between 1 and 21."""
    dark, light = sorted((_find_luminance(first), _find_luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def _find_luminance(colour: str) -> float:
    shares = (channel / 255 for channel in _read_colour(colour))
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _read_colour(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def _draw_heads(groups: Sequence[tuple[str, int]], cell: int) -> str:
    """The row of the groups' names: upright, or from below upwards where one is wider than its columns."""
    is_turned = any(_measure(shorten(name, _LONGEST)) > size * cell for name, size in groups)
    turned = ' class="edge turned"' if is_turned else ' class="edge"'
    heads = (_head(name, _LONGEST, f' scope="colgroup" colspan="{size}"{turned}', is_turned) for name, size in groups)
    return f"<tr><th></th>{''.join(heads)}</tr>"


def _head(label: str, longest: int, attributes: str, is_turned: bool = False) -> str:
    shown, full = shorten(label, longest), printable(label)
    title = f' title="{escape(full)}"' if shown != full else ""
    text = f"<span>{escape(shown)}</span>" if is_turned else escape(shown)
    return f"<th{attributes}{title}>{text}</th>"


def _edge(n: int) -> str:
    return ' class="edge"' if n == 1 else ""


def _measure(text: str) -> int:
    """CSS pixels, about; the letters of East Asia are as wide as they are high."""
    return sum(2 * _LETTER if unicodedata.east_asian_width(letter) in "WF" else _LETTER for letter in text)


def shorten(label: str, longest: int) -> str:
    """Safe to show, and cut to so many letters."""
    label = printable(label)
    return label if len(label) <= longest else label[: longest - 1] + "…"
