"""Charts as inline SVG whose colours are the page's own, so that they read in light and in dark."""

import html
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moerec.config.terminal import printable
from moerec.eval.report.table import format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that matplotlib draws with, each replaced by one of the page.
_INK, _MUTED, _RULE, _ACCENT, _SECOND = "#000001", "#000002", "#000003", "#000004", "#000005"
_PAGE_COLOURS = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    _ACCENT: "var(--accent)",
    _SECOND: "var(--second)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "moerec",
    "font.family": "DejaVu Sans",  # comes with matplotlib; here only to measure
    "font.size": 11,
    "text.parse_math": False,  # names are no formulas
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
}
_MOST_POINTS = 1000  # of a curve


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, mark: int | None = None) -> str:
    """A line for each named curve of (step, value) points, labelled at its end; `mark` is a step to point out."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        (figure, axes), ends = _new_figure(4.6, 2.7), list[tuple[str, tuple[int, float], str]]()
        for colour, (name, points) in zip((_ACCENT, _SECOND, _MUTED), curves.items(), strict=False):
            kept = points[:: math.ceil(len(points) / _MOST_POINTS)]
            kept = kept if kept[-1] == points[-1] else [*kept, points[-1]]
            marker = "o" if len(kept) <= 12 else None
            axes.plot([x for x, _ in kept], [y for _, y in kept], color=colour, marker=marker, markersize=3)
            ends.append((name, kept[-1], colour))
        if len(curves) > 1:
            _label_ends(axes, ends)
        if mark is not None:
            axes.axvline(mark, color=_MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.margins(x=0.02, y=0.2)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.set_xlabel("step")
        return _to_svg(figure, title)


def _label_ends(axes: "Axes", ends: Sequence[tuple[str, tuple[int, float], str]]) -> None:
    """Names at the ends of curves: the highest one's above it, the lowest one's below, so that none meets another."""
    by_height = sorted(ends, key=lambda end: -end[1][1])
    for place, (name, at, colour) in enumerate(by_height):
        is_below = 0 < place == len(by_height) - 1
        offset, side = ((-2, -7), "top") if is_below else ((-2, 7), "bottom")
        style: dict[str, Any] = {"color": colour, "ha": "right", "va": side, "annotation_clip": False}
        axes.annotate(name, at, offset, textcoords="offset points", **style)


def draw_bars(bars: Mapping[str, tuple[float, int | None]], title: str) -> str:
    """A horizontal bar for each label: its value and its number of targets."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "axes.grid": False, "axes.spines.bottom": False}):
        figure, axes = _new_figure(4.6, 0.4 + 0.3 * len(bars))
        values = [value for value, _ in bars.values()]
        axes.barh(range(len(bars)), values, height=0.62, color=_ACCENT)
        most = max(values, default=0)
        most = most if most > 1e-9 else 1
        for place, (value, n) in enumerate(bars.values()):
            axes.text(value + 0.015 * most, place, format_value(value), va="center", color=_INK)
            if n is not None:
                axes.text(1.5 * most, place, f"{n:,}", va="center", ha="right", color=_MUTED)
        axes.text(1.5 * most, -0.9, "targets", va="center", ha="right", color=_MUTED, fontsize=10)
        axes.set_xlim(0, 1.5 * most)
        axes.set_ylim(len(bars) - 0.5, -1.3)
        axes.set_xticks([])
        axes.set_yticks(range(len(bars)), [_shorten(label) for label in bars])
        axes.tick_params(axis="y", labelcolor=_INK)
        return _to_svg(figure, title)


def _new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _to_svg(figure: "Figure", title: str) -> str:
    out = io.StringIO()
    no_metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's font will have it
        figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # Namespaces have no meaning inside HTML, styles would leak into the page, and ids must not repeat between charts.
    view = re.search(r'viewBox="([^"]*)"', svg)
    head = f'<svg viewBox="{view[1] if view else ""}" role="img" aria-label="{html.escape(title)}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    own = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\1{own}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(font(?:-family)?:[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1inherit", svg)
    for drawn, page in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, page)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _shorten(label: str) -> str:
    label = printable(label)
    return label if len(label) <= 20 else label[:19] + "…"
