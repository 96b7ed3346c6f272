"""Documents about the city, written as they are read: descriptions, reviews, questions with answers, instructions.

A document is in one language, drawn evenly, and what it says holds in the world that the events are drawn from: an
item's brand, variety, price, section and service, what serves a need and which need follows it, and what a reviewer of
one of the taste types thinks of an item. So a model that has read them knows something about items it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moerec.config import CityConfig
from moerec.data.city import names
from moerec.data.city.services import N_KINDS
from moerec.data.city.texts import phrases
from moerec.data.city.texts.phrases import Forms, Pair
from moerec.data.city.world import BRAND_WEIGHT, BUDGET_WEIGHT, VARIETY_WEIGHT, World, make_world

RU, EN = 0, 1
_STREAM = 5  # of random numbers; 0 to 4 draw the world, its users and its services
_BLOCK = 1024  # documents of one generator
_LISTED = 4  # most items that an answer lists


def write_documents(kind: str, config: CityConfig, seed: int, n: int) -> Iterator[str]:
    """The first `n` documents of a kind; the k-th one is the same whatever `n` is, and equal for equal seeds.

    Args: one of `KINDS`; the world and its seed (`make_world`).
    """
    writer = _Writer(make_world(config, seed))
    for first in range(0, n, _BLOCK):
        rng = np.random.default_rng([seed, _STREAM, KINDS.index(kind), first // _BLOCK])
        for _ in range(min(_BLOCK, n - first)):
            yield writer.write(kind, _Draws(rng))


class _Draws:
    """Choices from few things, by one uniform number each, which is a tenth of the time of the generator's own."""

    _AT_ONCE = 64

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._left: list[float] = []

    def below(self, n: int) -> int:
        if not self._left:
            self._left = self._rng.random(self._AT_ONCE).tolist()
        return int(self._left.pop() * n)

    def pick(self, values: Sequence):
        return values[self.below(len(values))]


class _Writer:
    """The world's facts as words of both languages, and the documents that are made of them."""

    def __init__(self, world: World):
        self._world = world
        self._needs = list(world.needs)
        categories = list(names.CATEGORIES)
        self._n_items, per_service = world.catalogue.n_items, world.config.items_per_service
        self._title = [tuple(text.split(" / ", 1)) for text in world.catalogue.text.tolist()]
        self._category = world.category_I.tolist()
        services = [_name_service(name) for name in world.catalogue.services]
        self._service = [services[i // per_service] for i in range(self._n_items)]
        self._products: list[Pair] = []
        self._variety: list[Pair] = []
        for c, p, v in zip(self._category, world.product_I.tolist(), world.variety_I.tolist(), strict=True):
            category = names.CATEGORIES[categories[c]]
            self._products.append(category.products[p % len(category.products)])
            self._variety.append(names.VARIETIES[category.aspect][v][1:])
        fits_NC = world.need_fit_NC > 0
        self._served = [[self._needs[k] for k in np.flatnonzero(fits_NC[:, c])] for c in range(len(categories))]
        self._serving = [np.flatnonzero(fits_NC[k]).tolist() for k in range(len(self._needs))]
        self._next = [np.argsort(-row, kind="stable")[:2].tolist() for row in world.need_after_NN]
        self._by_place: dict[tuple, list[int]] = {}
        for i, (c, b) in enumerate(zip(self._category, world.brand_I.tolist(), strict=True)):
            for key in ((self._service[i], "category", c), (self._service[i], "brand", b), ("category", c)):
                self._by_place.setdefault(key, []).append(i)

    def write(self, kind: str, draws: _Draws) -> str:
        kind = draws.pick(KINDS[:-1]) if kind == ALL else kind
        return _MAKERS[kind](self, draws, draws.below(2))

    def describe(self, draws: _Draws, lang: int) -> str:
        facts = self._facts(draws.below(self._n_items), lang)
        parts = [_fill(form, facts, draws, lang) for form in phrases.DESCRIPTIONS]
        return " ".join(parts)

    def review(self, draws: _Draws, lang: int) -> str:
        """By one of the taste types: the stars follow the utilities of variety, price and brand."""
        world, i = self._world, draws.below(self._n_items)
        k, facts = draws.below(world.n_types), self._facts(i, lang)
        aspect = names.CATEGORIES[list(names.CATEGORIES)[self._category[i]]].aspect
        wanted = int(world.aspect_K[aspect][k])
        suits = wanted == int(world.variety_I[i])
        budget = int(world.aspect_K["budget"][k])
        gap, taste = abs(budget - int(world.price_I[i])), float(world.brand_taste_KR[k, world.brand_I[i]])
        utility = VARIETY_WEIGHT * suits - BUDGET_WEIGHT * gap + taste
        highest, lowest = VARIETY_WEIGHT + BRAND_WEIGHT, -2 * BUDGET_WEIGHT - BRAND_WEIGHT
        stars = 1 + round(4 * (utility - lowest) / (highest - lowest))
        facts |= {
            "wanted": names.VARIETIES[aspect][wanted][1 + lang],
            "budget": phrases.BUDGETS[budget][lang],
            "stars": str(stars),
            "again": phrases.AGAIN[stars >= 3][lang],
        }
        opinions = [phrases.VARIETY[suits], phrases.BUDGET[gap == 0], phrases.BRAND[1 + int(np.sign(taste))]]
        left_out = draws.below(2 * len(opinions))  # half of the reviews do not go into everything
        said = [form for place, form in enumerate(opinions) if place != left_out]
        return " ".join(_fill(form, facts, draws, lang) for form in (phrases.OPENINGS, *said, phrases.VERDICTS))

    def ask(self, draws: _Draws, lang: int) -> str:
        facts = self._facts_of_need(draws, lang)
        question, answer = draws.pick(list(phrases.QUESTIONS.values()))
        asked = phrases.QUESTION[lang] + _fill(question, facts, draws, lang)
        return f"{asked}\n{phrases.ANSWER[lang]}{_fill(answer, facts, draws, lang)}"

    def instruct(self, draws: _Draws, lang: int) -> str:
        facts = self._facts_of_need(draws, lang)
        task, reply = draws.pick(list(phrases.INSTRUCTIONS.values()))
        asked = phrases.TASK[lang] + _fill(task, facts, draws, lang)
        told = _fill(reply, facts, draws, lang)
        return f"{asked}\n{phrases.REPLY[lang]}{told[0].upper()}{told[1:]}"

    def _facts(self, i: int, lang: int) -> dict[str, str]:
        world, c = self._world, self._category[i]
        served = [phrases.NEEDS[need][lang] for need in self._served[c]]
        return {
            "product": self._products[i][lang],
            "brand": names.BRANDS[int(world.brand_I[i])][lang],
            "variety": self._variety[i][lang],
            "price": phrases.PRICES[int(world.price_I[i])][lang],
            "category": phrases.CATEGORIES[list(names.CATEGORIES)[c]][lang],
            "service": self._service[i][lang],
            "needs": ", ".join(served) or ("разное", "anything")[lang],
            "title": self._title[i][lang],
            "other_title": self._title[i][1 - lang],
        }

    def _facts_of_need(self, draws: _Draws, lang: int) -> dict[str, str]:
        """Of an item that serves the need, and of what else does, in its service and for a budget."""
        world, n = self._world, draws.below(len(self._needs))
        known = [c for c in self._serving[n] if ("category", c) in self._by_place]
        i = draws.pick(self._by_place["category", draws.pick(known)]) if known else draws.below(self._n_items)
        c, b, place = self._category[i], int(world.brand_I[i]), self._service[i]
        budget = draws.below(len(phrases.BUDGETS))
        basket = [j for c in known for j in self._by_place["category", c] if world.price_I[j] == budget]
        lines = [self._title[j][lang] for j in _some(basket or [i], draws)]

        def join(items: list[int]) -> str:
            return "; ".join(self._title[j][lang] for j in _some(items, draws))

        return self._facts(i, lang) | {
            "need": phrases.NEEDS[self._needs[n]][lang],
            "next_needs": ", ".join(phrases.NEEDS[self._needs[k]][lang] for k in self._next[n]),
            "items": join(self._by_place[place, "category", c]),
            "brand_items": join(self._by_place[place, "brand", b]),
            "budget": phrases.BUDGETS[budget][lang],
            "lines": "\n".join(f"{place}. {line}" for place, line in enumerate(lines, 1)),
        }


_MAKERS: dict[str, Callable[[_Writer, _Draws, int], str]] = {
    "descriptions": _Writer.describe,
    "reviews": _Writer.review,
    "questions": _Writer.ask,
    "instructions": _Writer.instruct,
}
ALL = "all"
KINDS = (*_MAKERS, ALL)


def _fill(forms: Forms, facts: dict[str, str], draws: _Draws, lang: int) -> str:
    return draws.pick(forms[lang]).format_map(facts)


def _some(items: list[int], draws: _Draws) -> list[int]:
    """Up to `_LISTED` of the items that follow each other, from a drawn one on."""
    first = draws.below(len(items))
    return list(dict.fromkeys((items[first:] + items[:first])[:_LISTED]))


def _name_service(name: str) -> Pair:
    """Of three services, or of one of several copies, whose number stands behind it."""
    base = name.rstrip("0123456789")
    ru, en = phrases.SERVICES[base]
    return (f"{ru}{name[len(base) :]}", f"{en}{name[len(base) :]}") if len(name) > len(base) else (ru, en)


assert set(phrases.CATEGORIES) == set(names.CATEGORIES)
assert len(phrases.SERVICES) == N_KINDS
