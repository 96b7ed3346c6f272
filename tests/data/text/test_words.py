"""The vocabulary and the token ids, against a slow reading of the same texts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.data.dataset import ItemTable
from moerec.data.text.words import N_SPECIAL, PAD, UNKNOWN, split_words, tokenize

LETTERS = "abzABZéÉßабвёяАБВЁЯ0479"
WORDS = st.text(st.sampled_from(LETTERS), min_size=1, max_size=3)
TEXT = st.text(st.sampled_from(LETTERS + " -–,.!&'\"/()№_\t\n  "), max_size=20)
ATTRIBUTES = st.lists(
    st.builds(lambda a, b: f"{a}={b}", st.sampled_from(["brand", "Категория"]), WORDS) | WORDS, max_size=3
).map(" ".join)


def make_catalogue(text, attributes=None) -> ItemTable:
    n = len(text)
    attributes = [""] * n if attributes is None else attributes
    ids = np.array([str(k) for k in range(n)], np.str_)
    return ItemTable(("shop",), np.array([0, n]), ids, np.array(text, np.str_), np.array(attributes, np.str_))


def words_by_hand(text: str, attributes: str) -> list[str]:
    words, word = [], ""
    for letter in [*text.lower(), " "]:
        if letter.isalnum():
            word += letter
        elif word:
            words.append(word)
            word = ""
    return words + attributes.split()


def table_by_hand(text, attributes, max_tokens, vocab_size):
    items = [words_by_hand(*pair) for pair in zip(text, attributes, strict=True)]
    count = Counter(word for words in items for word in words)
    ranked = sorted(count, key=lambda word: (-count[word], word))
    vocabulary = [word for word in ranked[:vocab_size] if count[word] > 1]
    ids = [
        [vocabulary.index(word) + N_SPECIAL if word in vocabulary else UNKNOWN for word in words][:max_tokens]
        for words in items
    ]
    width = max([len(x) for x in ids] + [1])
    return [x + [PAD] * (width - len(x)) for x in ids], tuple(vocabulary)


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXT, ATTRIBUTES), min_size=1, max_size=8), st.integers(1, 6), st.integers(1, 6))
def test_equals_a_slow_tokenizer(items, max_tokens, vocab_size):
    text, attributes = zip(*items, strict=True)
    table = tokenize(make_catalogue(text, attributes), max_tokens, vocab_size)
    ids, words = table_by_hand(text, attributes, max_tokens, vocab_size)
    assert table.words == words
    assert table.ids.tolist() == ids
    assert table.ids.dtype == np.int32
    assert table.n_tokens == len(words) + N_SPECIAL > table.ids.max()


@settings(max_examples=30)
@given(st.lists(st.tuples(TEXT, ATTRIBUTES), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_vocabulary_does_not_depend_on_the_order_of_the_items(items, random):
    order = list(range(len(items)))
    random.shuffle(order)
    table, other = (
        tokenize(make_catalogue(*zip(*(items[k] for k in rows), strict=True)), 5, 4)
        for rows in (range(len(items)), order)
    )
    assert table.words == other.words
    np.testing.assert_array_equal(table.ids[order], other.ids)


def words_of(text: str, attributes: str = "") -> list[str]:
    offsets, words = split_words(np.array([text]), np.array([attributes]))
    assert offsets.tolist() == [0, len(words)]
    return words.to_pylist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Чай «Зелёный», 100 г", ["чай", "зелёный", "100", "г"]),
        ("TWININGS Earl-Grey", ["twinings", "earl", "grey"]),
        ("молоко 3.2%", ["молоко", "3", "2"]),
        ("ЁЖИК Éclair ẞ", ["ёжик", "éclair", "ß"]),
        ("a_b", ["a", "b"]),
        ("  --  ", []),
        ("", []),
        ("お茶 2", ["お茶", "2"]),
    ],
)
def test_words_of_a_text(text, words):
    assert words_of(text) == words


def test_attributes_stay_whole_and_come_last():
    assert words_of("Чай, tea", " brand=Earl-Grey  цвет=Зелёный ") == [
        "чай",
        "tea",
        "brand=Earl-Grey",
        "цвет=Зелёный",
    ]


def test_words_used_once_are_unknown_and_the_most_frequent_come_first():
    table = tokenize(make_catalogue(["b a rare", "a b", "c c a", ""]), 10, 100)
    assert table.words == ("a", "b", "c")
    a, b, c = range(N_SPECIAL, N_SPECIAL + 3)
    assert table.ids.tolist() == [[b, a, UNKNOWN], [a, b, PAD], [c, c, a], [PAD] * 3]


def test_vocab_size_and_max_tokens_cut():
    table = tokenize(make_catalogue(["b a a", "a b", "c c a"]), 2, 1)
    assert table.words == ("a",)
    assert table.ids.tolist() == [[UNKNOWN, N_SPECIAL], [N_SPECIAL, UNKNOWN], [UNKNOWN, UNKNOWN]]


@pytest.mark.parametrize("n", [0, 3])
def test_catalogue_without_any_text(n):
    table = tokenize(make_catalogue([""] * n), 4, 10)
    assert table.words == ()
    assert table.n_tokens == N_SPECIAL
    assert table.ids.tolist() == [[PAD]] * n
