"""Texts of the city: the same for the same seed, in both languages, and true of its world."""

import itertools
import re

import numpy as np
import pytest

from moerec.config import CityConfig
from moerec.data.city import make_world, names
from moerec.data.city.texts import KINDS, phrases, write_documents

CONFIG = CityConfig(items_per_service=40)
WORLD = make_world(CONFIG, 3)


def is_russian(text: str) -> bool:
    return bool(re.search("[а-яё]", text))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_a_function_of_the_seed_and_their_number(kind):
    many = list(write_documents(kind, CONFIG, 3, 1200))
    assert list(write_documents(kind, CONFIG, 3, 1100)) == many[:1100]
    assert list(itertools.islice(write_documents(kind, CONFIG, 3, 10**12), 5)) == many[:5], "no stream"
    assert list(write_documents(kind, CONFIG, 4, 50)) != many[:50]
    n_russian = sum(map(is_russian, many))
    if kind not in ("instructions", "all"):  # where some have both languages
        assert 500 < n_russian < 700
    assert len(set(many)) > 400
    assert not any("{" in text or text != text.strip() for text in many)


def test_all_kinds_are_written_alike():
    texts = list(write_documents("all", CONFIG, 3, 800))
    asked = sum(text.startswith(phrases.QUESTION) for text in texts)
    told = sum(text.startswith(phrases.TASK) for text in texts)
    assert 150 < asked < 250
    assert 150 < told < 250


def find_titles(text: str) -> set[str]:
    return {title for title in ALL_TITLES if title in text}


ALL_TITLES = {title for text in WORLD.catalogue.text.tolist() for title in text.split(" / ")}


def test_a_description_tells_brand_variety_service_and_price_of_one_item():
    found = 0
    for text in write_documents("descriptions", CONFIG, 3, 300):
        lang = 0 if is_russian(text) else 1
        matches = []
        for i in range(WORLD.catalogue.n_items):
            category = names.CATEGORIES[list(names.CATEGORIES)[WORLD.category_I[i]]]
            product = category.products[WORLD.product_I[i] % len(category.products)][lang]
            variety = names.VARIETIES[category.aspect][WORLD.variety_I[i]][1 + lang]
            service = phrases.SERVICES[WORLD.catalogue.services[i // 40]][lang]
            facts = (product, names.BRANDS[WORLD.brand_I[i]][lang], variety, service)
            matches.append(all(fact in text for fact in (*facts, phrases.PRICES[WORLD.price_I[i]][lang])))
        found += any(matches)
    assert found == 300


def test_what_is_said_to_follow_a_need_does():
    asked = [text for text in write_documents("questions", CONFIG, 3, 600) if "Most often: " in text]
    assert len(asked) > 40
    english = {pair[1]: name for name, pair in phrases.NEEDS.items()}
    for text in asked:
        first, then = (x[x.rindex(": ") + 2 :] if k else x for k, x in enumerate(text.split("\n")))
        need = next(name for words, name in english.items() if f" {words}?" in first or f"First {words}." in first)
        row = WORLD.need_after_NN[WORLD.needs.index(need)]
        named = [WORLD.needs.index(english[words]) for words in then.rstrip(".").split(", ")]
        assert sorted(row[named]) == sorted(np.sort(row)[-2:])


def test_translations_are_the_titles_of_the_catalogue():
    texts = [text for text in write_documents("instructions", CONFIG, 3, 600) if "Translate into Russian: " in text]
    assert len(texts) > 40
    pairs = {tuple(reversed(text.split(" / "))) for text in WORLD.catalogue.text.tolist()}
    for text in texts:
        task, reply = text.split("\n")
        english, russian = task.split("Russian: ")[1].rstrip("."), reply.split("Response: ")[1].rstrip(".")
        assert (english, russian) in pairs


def test_the_better_an_item_fits_the_more_stars_it_gets():
    """A review that likes variety, price and brand has more of them than one that likes none."""
    liked, disliked = [], []
    for text in write_documents("reviews", CONFIG, 3, 3000):
        stars = re.search(r"(\d) (?:of|из) 5|(?:rating:|Оценка —) (\d)", text)
        assert stars is not None
        n = int(stars[1] or stars[2])
        assert 1 <= n <= 5
        if "exactly what we look for" in text and "suits us" in text and "favourite" not in text:
            liked.append(n)
        if "We wanted" in text and "do not like" in text:
            disliked.append(n)
    assert min(liked) >= 3
    assert max(disliked) <= 3
    assert np.mean(liked) > np.mean(disliked) + 1.5


def test_copies_of_services_have_names_of_their_own():
    config = CityConfig(items_per_service=20, n_services=6)
    texts = " ".join(write_documents("descriptions", config, 0, 400))
    assert all(name in texts for name in ("Samokat0", "Samokat1", "Купер0", "Купер1"))
