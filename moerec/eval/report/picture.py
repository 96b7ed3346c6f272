"""A picture of a run's model, drawn from its configuration: what is switched on, and how large it is.

Inline SVG of `WIDTH` units, which is about the width of a narrow screen in CSS pixels, in the colours of the page.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moerec.config import Config, ModelConfig
from moerec.config.stored import build_config
from moerec.errors import InputError
from moerec.eval.report.heat_map import shorten
from moerec.nn.block import LayerGroup, split_layers
from moerec.nn.heads.service_answers import component_names

WIDTH = 380
_LEFT, _RIGHT, _MIDDLE = 4, 364, 184  # the column of blocks; the posterior goes down to its right
_LINE, _SMALL, _HEAD = 15, 11, 13  # units: a line of text, and sizes of letters
_LETTER, _WIDE_LETTER = 0.57, 0.65  # of a letter's size, its width, in lines of text and in headings and names
_MOST_SQUARES = 8  # experts of a group that are drawn


def draw_model(metrics: Mapping[str, Any], values: Mapping[str, Any]) -> str | None:
    """The picture of the model of a run with this plain configuration; None where it is none of this version."""
    try:
        config = build_config({name: value for name, value in values.items() if name != "format"})
    except InputError:
        return None
    data = metrics.get("dataset") or {}
    services = [str(name) for name in data.get("services") or ()]
    picture = _Picture()
    _Parts(picture, config, services, data.get("n_items")).draw()
    return picture.finish(f"The model of the run: {config.name}")


class _Picture:
    """Boxes from above downwards; `y` is where the next one begins."""

    def __init__(self) -> None:
        self.y, self._shapes = 4.0, list[str]()

    def add(self, shape: str) -> None:
        self._shapes.append(shape)

    def write(self, x: float, y: float, text: str, kind: str = "", size: int = _SMALL, anchor: str = "start") -> None:
        at = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
        self.add(f'<text {at} class="{kind}">{escape(text)}</text>')

    def box(
        self, title: str, lines: Sequence[str], kind: str = "", x: float = _LEFT, right: float = _RIGHT, more: float = 0
    ) -> tuple[float, float]:
        """A box with a heading and lines of text, wrapped; returns where it ends, and where the text in it does."""
        width = right - x
        wrapped = [part for line in lines for part in _wrap(line, width - 16, _SMALL)]
        heads = _wrap(title, width - 16, _HEAD, _WIDE_LETTER)
        text_end = self.y + 8 + _LINE * (len(heads) + len(wrapped))
        end = text_end + more + 6
        place = f'x="{x}" y="{self.y:.1f}" width="{width}" height="{end - self.y:.1f}" rx="5"'
        self.add(f'<rect {place} class="box {kind}"/>')
        for n, head in enumerate(heads, 1):
            self.write(x + 8, self.y + 4 + _LINE * n, head, "head", _HEAD)
        for n, line in enumerate(wrapped, len(heads) + 1):
            self.write(x + 8, self.y + 4 + _LINE * n, line, "small")
        return end, text_end

    def arrow(self, x: float, top: float, bottom: float, kind: str = "") -> None:
        self.add(f'<path d="M{x} {top:.1f}V{bottom - 5:.1f}" class="line {kind}"/>')
        self.add(f'<path d="M{x - 4} {bottom - 6:.1f}L{x} {bottom:.1f}L{x + 4} {bottom - 6:.1f}Z" class="tip {kind}"/>')

    def go_on(self, end: float, label: str = "") -> None:
        """An arrow from the box that ends here to the next one."""
        self.arrow(_MIDDLE, end, end + 22)
        if label:
            self.write(_MIDDLE + 9, end + 15, label, "small")
        self.y = end + 22

    def finish(self, title: str) -> str:
        head = f'<svg viewBox="0 0 {WIDTH} {self.y + 4:.0f}" role="img" aria-label="{escape(title)}" class="model">'
        return "\n".join([head, f"<title>{escape(title)}</title>", *self._shapes, "</svg>"])


@dataclasses.dataclass
class _Parts:
    """What is drawn of a model. Args: `n_items` of the catalogue, None where the run does not tell."""

    picture: _Picture
    config: Config
    services: list[str]
    n_items: int | None

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def is_text(self) -> bool:
        return self.config.data.source == "text"

    def draw(self) -> None:
        picture, model = self.picture, self.model
        groups = split_layers(model)
        first_upper = model.ask.from_layer or min(model.moe.layers, default=model.n_layers)
        trunk = [group for group in groups if group.first < first_upper]
        upper = [group for group in groups if group.first >= first_upper]
        end, _ = picture.box(*self._describe_input())
        picture.go_on(end, f"vectors of {model.d_model}")
        for group in trunk:
            name = "Trunk" if upper else "Decoder"
            end, _ = picture.box(f"{name}, {_name_layers(group)}", self._describe_block(group))
            picture.go_on(end)
        posterior = self._draw_sides() if not self.is_text else None
        for group in upper:
            picture.go_on(self._draw_upper(group))
        end, _ = picture.box(*self._describe_answer())
        picture.go_on(end)
        top = picture.y
        end, _ = picture.box(*self._describe_output(), "out")
        if posterior is not None:
            self._draw_posterior(posterior, top + 14)
        picture.y = end

    def _describe_input(self) -> tuple[str, list[str]]:
        model, data = self.model, self.config.data
        if self.is_text:
            return "Words", [f"rows of {model.text.vocab_size:,} tokens; documents in windows of {data.history_len}"]
        parts = (
            (model.item_row, "the item's own row"),
            (model.item_text, f"its text and attributes ({model.d_text})"),
            (model.item_states, "states of its text by a language model"),
            (model.service, "service"),
            (model.action, "action"),
            (model.event_time, f"time ({model.time.kind})"),
        )
        lines = ["an event is the sum of " + ", ".join(name for is_on, name in parts if is_on)]
        asks = ((model.request_time, "time"), (model.request_context, "context"))
        if known := [name for is_on, name in asks if is_on]:
            lines.append(f"its slot knows of the next request: {', '.join(known)}")
        if data.first_event:
            lines.append("the first slot is a control slot, <|recommend|>")
        return f"The user's last {data.history_len} events", lines

    def _describe_block(self, group: LayerGroup) -> list[str]:
        model = self.model
        shared = f", {model.n_kv_heads} of keys and values" if model.n_kv_heads != model.n_heads else ""
        window = f", the last {model.window} slots" if model.window else ""
        lines = [f"attention: {model.n_heads} heads of {model.d_head}{shared}{window}"]
        if group.personal:
            lines.append(f"conditioned on the profile: {', '.join(self._list_personal())}")
        return lines if group.experts else [*lines, f"feed-forward layer of width {model.d_ff}"]

    def _list_personal(self) -> list[str]:
        personal = self.model.personal
        parts = (
            (personal.prefix, "keys and values"),
            (personal.query_scale, "scale of queries"),
            (personal.time_bias, "bias of times"),
            (personal.pair_bias, "bias of pairs of services"),
        )
        return [name for is_on, name in parts if is_on]

    def _draw_sides(self) -> float | None:
        """The profile and the analyser beside each other; returns where the posterior leaves the analyser."""
        picture, model = self.picture, self.model
        top, ends, posterior = picture.y, [], None
        has_analyser = bool(model.moe.layers) or model.is_asked
        if model.personal.layers:
            personal = model.personal
            read = [
                name for is_on, name in ((personal.read, "states"), (personal.route, "routers of experts")) if is_on
            ]
            lines = [f"memory: {personal.memory}, {personal.n_aspects} aspects at {personal.n_scales} time scales"]
            lines += [f"slots of width {personal.d_memory}" + (", and static fields" if personal.fields else "")]
            lines += [f"its router adds relevance to: {', '.join(read)}"] if read else []
            ends.append(picture.box("Profile", lines, "profile", right=_MIDDLE - 10)[0])
        if has_analyser:
            n = model.ask.analyser_layers if model.is_asked else 0
            lines = [f"p(service), {len(self.services) or 'all'} services"]
            lines += [f"{n} layer{'s' * (n > 1)} of its own, width {model.ask.d_analyser}"] if n else []
            reads = bool(model.moe.layers) and model.moe.reads_domain
            lines += ["read by the routers of the experts"] if reads else []
            ends.append(picture.box("Analyser", lines, "analyser", x=_MIDDLE + 10)[0])
            posterior = top + 14 if model.is_asked else None
        if ends:
            bottom = max(ends)
            picture.add(f'<path d="M{_MIDDLE} {top:.1f}V{bottom:.1f}" class="line"/>')
            if model.personal.layers:
                picture.arrow(_MIDDLE / 2, ends[0], bottom + 22, "profile")
            if has_analyser and model.moe.layers and model.moe.reads_domain:
                picture.arrow((_MIDDLE + _RIGHT) / 2, ends[-1], bottom + 22, "analyser")
            picture.go_on(bottom)
        return posterior

    def _draw_upper(self, group: LayerGroup) -> float:
        """A group of layers above the trunk, with its experts; returns where it ends."""
        picture, model, moe = self.picture, self.model, self.model.moe
        asked = "asked once for each service" if model.is_asked else ""
        title = f"{_name_layers(group).capitalize()}{', ' * bool(asked)}{asked}"
        lines = self._describe_block(group)
        if not group.experts:
            return picture.box(title, lines, "asked" if asked else "")[0]
        of_service = moe.n_per_group * bool(moe.services)
        counts = [(name, of_service) for name in self.services if of_service]
        counts += [("cross", moe.n_per_group)] if moe.cross else []
        total = sum(n for _, n in counts)
        opened = "of the service's group and cross" if model.is_asked and moe.cross else ""
        lines.append(
            f"experts of width {moe.d_expert}: {moe.n_active} of {total} for a slot" + f", {opened}" * bool(opened)
        )
        if moe.d_shared:
            lines.append(f"and one of width {moe.d_shared} for every slot")
        chips = _place_chips(counts, _RIGHT - _LEFT - 16)
        rows = 1 + max((row for *_, row in chips), default=-1)
        end, text_end = picture.box(title, lines, "asked" if asked else "", more=rows * 40 + 2)
        for name, n, x, width, row in chips:
            top = text_end + 4 + row * 40
            self._draw_group(name, n, _LEFT + 8 + x, top, width)
        return end

    def _draw_group(self, name: str, n: int, x: float, top: float, width: float) -> None:
        picture, kind = self.picture, "cross" if name == "cross" else "expert"
        place = f'x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="34" rx="4"'
        picture.add(f'<rect {place} class="group"><title>{escape(name)}: {n}</title></rect>')
        picture.write(x + 6, top + 13, shorten(name, 16), "small")
        for square in range(min(n, _MOST_SQUARES)):
            at = f'x="{x + 6 + 13 * square:.1f}" y="{top + 19:.1f}" width="10" height="10" rx="2"'
            picture.add(f'<rect {at} class="{kind}"/>')
        if n > _MOST_SQUARES:
            picture.write(x + 8 + 13 * _MOST_SQUARES, top + 28, f"… {n}", "small")

    def _describe_answer(self) -> tuple[str, list[str]]:
        model = self.model
        if self.is_text:
            tied = ", which shares the words' rows" if model.text.tie_head else ""
            return "Text head", [f"softmax over {model.text.vocab_size:,} tokens{tied}"]
        catalogue = f"{self.n_items:,} items" if self.n_items else "the items"
        tied = ", whose vectors the input shares" if model.tie_items else ""
        over = "the items of the service asked" if model.is_asked else catalogue
        lines = [f"softmax over {over}{tied}"]
        if not model.has_pointers:
            return "Item head", lines
        told = {
            "own": "the service's events (pointer)",
            "shared": "the user's events (pointer)",
            "text": "neighbors by text",
            "transitions": "neighbors by transitions",
            "crossings": "neighbors in other services",
        }
        names = component_names(model, self.services or ["own"])[1:]
        services = [name for name in names if name not in told]
        if services:
            lines.append("+ the events of each service (a pointer for each)")
        lines += [f"+ {told[name]}" for name in names if name in told]
        gate = "a gate of each service" if model.is_asked else "one gate"
        lines.append(f"mixed by {gate}; pointers of width {model.d_pointer}")
        return ("Each service's answer" if model.is_asked else "Item head"), lines

    def _describe_output(self) -> tuple[str, list[str]]:
        if self.is_text:
            return "p(next token)", []
        if self.model.is_asked:
            return "Aggregator: Σ p(service) p(item | service)", [self._tell_catalogue()]
        return "p(item)", [self._tell_catalogue()]

    def _tell_catalogue(self) -> str:
        items = f"{self.n_items:,} items" if self.n_items else "all items"
        return f"{items} of {len(self.services) or 'all'} service{'s' * (len(self.services) != 1)} in one list"

    def _draw_posterior(self, top: float, bottom: float) -> None:
        """From the analyser past the layers to the aggregator."""
        x = WIDTH - 6
        self.picture.add(f'<path d="M{_RIGHT} {top:.1f}H{x}V{bottom:.1f}H{_RIGHT + 6}" class="line analyser"/>')
        tip = f"M{_RIGHT + 6} {bottom - 4:.1f}L{_RIGHT} {bottom:.1f}L{_RIGHT + 6} {bottom + 4:.1f}Z"
        self.picture.add(f'<path d="{tip}" class="tip analyser"/>')


def _place_chips(counts: Sequence[tuple[str, int]], most: float) -> list[tuple[str, int, float, float, int]]:
    """(name, experts, x, width, row) of each group, in rows of at most this width."""
    placed, x, row = [], 0.0, 0
    for name, n in counts:
        squares = 13 * min(n, _MOST_SQUARES) + (30 if n > _MOST_SQUARES else 0)
        width = 12 + max(squares, _WIDE_LETTER * _SMALL * len(shorten(name, 16)))
        if x and x + width > most:
            x, row = 0.0, row + 1
        placed.append((name, n, x, width, row))
        x += width + 6
    return placed


def _wrap(text: str, width: float, size: int, letter: float = _LETTER) -> list[str]:
    """Lines of words that fit; a longer word is cut."""
    most = max(int(width / (letter * size)), 4)
    lines = [""]
    for word in (shorten(word, most) for word in text.split()):
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= most else [*lines, word]
    return [line for line in lines if line]


def _name_layers(group: LayerGroup) -> str:
    """Counted from 1."""
    first, last = group.first + 1, group.last
    return f"layer {first}" if first == last else f"layers {first} to {last}"
