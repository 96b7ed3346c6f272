"""The words of texts, against a slow reading of the same texts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.data.text.words import split_attributes, split_plain_words, split_texts, split_words

LETTERS = "abzABZéÉßабвёяАБВЁЯ0479"
WORDS = st.text(st.sampled_from(LETTERS), min_size=1, max_size=3)
TEXT = st.text(st.sampled_from(LETTERS + " -–,.!&'\"/()№_\t\n  "), max_size=20)
ATTRIBUTES = st.lists(
    st.builds(lambda a, b: f"{a}={b}", st.sampled_from(["brand", "Категория"]), WORDS) | WORDS, max_size=3
).map(" ".join)


def words_by_hand(text: str, attributes: str) -> list[str]:
    words, word = [], ""
    for letter in [*text.lower(), " "]:
        if letter.isalnum():
            word += letter
        elif word:
            words.append(word)
            word = ""
    return words + attributes.split()


@settings(max_examples=60)
@given(items=st.lists(st.tuples(TEXT, ATTRIBUTES), max_size=8))
@pytest.mark.parametrize("split", [split_words, split_plain_words])
def test_equals_a_slow_splitter(items, split):
    """Where letters have no marks of their own, and spaces between words, both kinds of words are the same."""
    text, attributes = (np.array([item[k] for item in items], object) for k in (0, 1))
    offsets, words = split(text, attributes)
    expected = [words_by_hand(*item) for item in items]
    assert words.to_pylist() == [word for words in expected for word in words]
    assert offsets.tolist() == [sum(map(len, expected[:k])) for k in range(len(items) + 1)]
    n_words = [len(words) - len(item[1].split()) for words, item in zip(expected, items, strict=True)]
    assert np.diff(split_texts(text)[0]).tolist() == n_words
    assert split_attributes(attributes)[1].to_pylist() == [token for item in items for token in item[1].split()]


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
        ("绿茶100克 乌龙茶", ["绿茶", "100", "克", "乌龙", "龙茶"]),
        ("コーヒー豆", ["コー", "ーヒ", "ヒー", "ー豆"]),
        ("ชาเขียว", ["ชา", "าเ", "เขี", "ขีย", "ยว"]),
        ("मसाला चाय", ["मसाला", "चाय"]),
        ("เก่า", ["เก่", "ก่า"]),
        ("iPad充电器v2", ["ipad", "充电", "电器", "v2"]),
        ("й e\u0301clair", ["й", "éclair"]),
        ("ＡＢＣ１２ ﬁsh 5㎏", ["abc12", "fish", "5kg"]),
        ("Lego™ №5 soft\u00adware", ["lego", "5", "software"]),
        ("❤\ufe0f 🍵", []),
    ],
)
def test_words_of_a_text(text, words):
    assert words_of(text) == words


def test_plain_words_are_as_they_were():
    """Runs of format 1 were trained on them: marks end a word, and a text without spaces is one."""
    _, words = split_plain_words(np.array(["मसाला Lego™ №5 乌龙茶 ＡＢ"]), np.array(["a=1"]))
    assert words.to_pylist() == ["मस", "ल", "lego", "5", "乌龙茶", "ａｂ", "a=1"]


def test_attributes_stay_whole_and_come_last():
    assert words_of("Чай, tea", " brand=Earl-Grey  цвет=Зелёный ") == [
        "чай",
        "tea",
        "brand=Earl-Grey",
        "цвет=Зелёный",
    ]
