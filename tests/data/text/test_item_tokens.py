"""Items as tokens, against the `tokenizers` library itself and against slow readings of the same items."""

import dataclasses
import json
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moerec.config import DataConfig
from moerec.data.dataset import ItemTable
from moerec.data.text.item_tokens import N_SPECIAL, PAD, UNKNOWN, ItemVocabulary, make_vocabulary
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError

SCRIPTS = {
    "chinese": ("绿茶100克", "乌龙茶"),
    "thai": ("ชาเขียวมัทฉะ", "กาแฟดำ"),
    "hindi": ("मसाला चाय", "मसाले"),
    "russian": ("Чай зелёный", "Чай чёрный"),
    "emoji": ("🍵", "🍵🍵🍰"),
    "mathematics": ("∑x", "∫x"),
}
TITLES = [title for pair in SCRIPTS.values() for title in pair] + ["Green Tea 100 g", "green tea, 250 g", ""]
ATTRIBUTES = [f"brand={'ab'[k % 2]} once={k}" for k in range(len(TITLES) - 1)] + [""]
LETTERS = "abzé茶绿าก่मा🍵Яй0479 -,.\t"
ITEMS = st.lists(
    st.tuples(
        st.text(st.sampled_from(LETTERS), max_size=20),
        st.lists(st.sampled_from(["a=1", "a=2", "b=3", "Цвет=алый"]), max_size=5).map(" ".join),
    ),
    min_size=1,
    max_size=8,
)


def make_catalogue(texts, attributes=None) -> ItemTable:
    n = len(texts)
    columns = (np.array(x, np.str_) for x in ([str(k) for k in range(n)], texts, attributes or [""] * n))
    return ItemTable(("shop",), np.array([0, n]), *columns)


def make_config(kind: str = "subwords", **fields) -> DataConfig:
    return DataConfig(**{"item_tokens": kind, "vocab_size": 300 if kind == "subwords" else 20, **fields})


def make(kind: str = "subwords", **fields) -> ItemVocabulary:
    return make_vocabulary(make_catalogue(TITLES, ATTRIBUTES), make_config(kind, **fields))


def rows(ids: np.ndarray) -> list[list[int]]:
    """The tokens of each item; padding is behind all of them."""
    found = [[id for id in row if id != PAD] for row in ids.tolist()]
    assert all(row[: len(own)] == own for row, own in zip(ids.tolist(), found, strict=True))
    return found


@settings(max_examples=30)
@given(ITEMS, st.integers(1, 6), st.integers(0, 3))
def test_subwords_are_those_of_the_library_and_attributes_stand_behind_them(items, max_tokens, max_attributes):
    texts, attributes = ([item[k] for item in items] for k in (0, 1))
    config = make_config(max_tokens=max_tokens, max_attributes=max_attributes)
    vocabulary = make_vocabulary(make_catalogue(texts, attributes), config)
    assert vocabulary.tokenizer is not None
    library = Tokenizer.from_str(vocabulary.tokenizer.content.decode())
    count = Counter(name for own in attributes for name in own.split())
    known = [name for name in sorted(count, key=lambda name: (-count[name], name)) if count[name] > 1]
    first = N_SPECIAL + library.get_vocab_size()
    encoded = vocabulary.encode_items(texts, attributes)
    for k, (text, own) in enumerate(zip(texts, attributes, strict=True)):
        pieces = [id + N_SPECIAL for id in library.encode(text).ids]
        names = [first + known.index(name) for name in own.split() if name in known]
        names += [UNKNOWN for name in own.split() if name not in known]
        assert rows(encoded.ids[k : k + 1]) == [pieces[:max_tokens] + names[:max_attributes]]
        assert encoded.is_text_cut[k] == (len(pieces) > max_tokens)
        assert encoded.are_attributes_cut[k] == (len(names) > max_attributes)
    assert encoded.ids.shape == (len(items), max_tokens + max_attributes)
    assert encoded.ids.dtype == np.int32
    assert vocabulary.n_tokens == first + len(known) > encoded.ids.max(initial=0)


@settings(max_examples=20)
@given(ITEMS, st.integers(1, 6), st.integers(0, 3), st.integers(1, 4))
def test_words_and_attributes_equal_a_slow_reading(items, max_tokens, max_attributes, vocab_size):
    """Of texts in which a space is between all words."""
    items = [(" ".join(text.split()).replace("茶", "e").replace("绿", "e"), own) for text, own in items]
    items = [("".join(c for c in text if c.isascii() and c not in "-,.").lower(), own) for text, own in items]
    texts, attributes = ([item[k] for item in items] for k in (0, 1))
    config = make_config("words", max_tokens=max_tokens, max_attributes=max_attributes, vocab_size=vocab_size)
    vocabulary = make_vocabulary(make_catalogue(texts, attributes), config)
    known = []
    for column in (texts, attributes):
        count = Counter(word for own in column for word in own.split())
        ranked = sorted(count, key=lambda word: (-count[word], word))[:vocab_size]
        known.append({word: k for k, word in enumerate(word for word in ranked if count[word] > 1)})
    assert (vocabulary.words, vocabulary.attributes) == tuple(map(tuple, known))
    for text, own, found in zip(texts, attributes, rows(vocabulary.encode(texts, attributes)), strict=True):
        words = [known[0].get(word, -1) + N_SPECIAL for word in text.split()]
        names = [known[1].get(name, -1 - len(known[0])) + N_SPECIAL + len(known[0]) for name in own.split()]
        names.sort(key=lambda id: id == UNKNOWN)
        assert found == words[:max_tokens] + names[:max_attributes]


@settings(max_examples=20)
@given(ITEMS, st.integers(1, 8), st.integers(1, 6))
def test_plain_words_are_those_of_format_1(items, max_tokens, vocab_size):
    """The tokenizer as it was: one vocabulary, the attributes behind the words, one cut."""

    def split(text: str, own: str) -> list[str]:
        letters = "".join(c if unicodedata.category(c)[0] in "LN" else " " for c in text.lower())
        return letters.split() + own.split()

    texts, attributes = ([item[k] for item in items] for k in (0, 1))
    config = make_config("plain_words", max_tokens=max_tokens, vocab_size=vocab_size)
    vocabulary = make_vocabulary(make_catalogue(texts, attributes), config)
    split_items = [split(*item) for item in items]
    count = Counter(word for words in split_items for word in words)
    ranked = sorted(count, key=lambda word: (-count[word], word))[:vocab_size]
    known = [word for word in ranked if count[word] > 1]
    expected = [[known.index(w) + N_SPECIAL if w in known else UNKNOWN for w in words] for words in split_items]
    assert vocabulary.words == tuple(known)
    encoded = vocabulary.encode_items(texts, attributes)
    assert rows(encoded.ids) == [own[:max_tokens] for own in expected]
    n_words = [len(split(text, "")) for text in texts]
    assert encoded.is_text_cut.tolist() == [n > max_tokens for n in n_words]
    is_cut = [len(own) > max(max_tokens, n) for own, n in zip(expected, n_words, strict=True)]
    assert encoded.are_attributes_cut.tolist() == is_cut


@pytest.mark.parametrize(("script", "titles"), SCRIPTS.items())
def test_titles_of_every_script_have_tokens_by_which_they_differ(script, titles):
    """As subwords, in a catalogue that has each of them once; and of a catalogue that has nothing of the script."""
    for vocabulary in (make(), make_vocabulary(make_catalogue(["tea"]), make_config())):
        first, second = rows(vocabulary.encode(titles))
        assert min(first + second) > UNKNOWN
        assert Counter(first) != Counter(second)
    vocabulary = make_vocabulary(make_catalogue([*titles, *titles]), make_config("words"))
    if script not in ("emoji", "mathematics"):  # which are no words
        first, second = rows(vocabulary.encode(titles))
        assert min(first + second) > UNKNOWN
        assert Counter(first) != Counter(second)


@pytest.mark.parametrize("kind", ["subwords", "words"])
def test_attributes_survive_a_long_text(kind):
    texts, attributes = ["tea time " * 40, "tea"], ["brand=acme kind=tea", "brand=acme kind=tea"]
    vocabulary = make_vocabulary(make_catalogue(texts, attributes), make_config(kind, max_tokens=3, max_attributes=2))
    long, short = rows(vocabulary.encode(texts, attributes))
    assert long[-2:] == short[-2:] == [vocabulary.n_tokens - 2, vocabulary.n_tokens - 1]
    table = vocabulary.encode_items(texts, attributes)
    assert table.measure() == {
        "vocabulary": vocabulary.n_tokens - N_SPECIAL,
        "slots": 5,
        "mean_tokens": 4.0,
        "text_cut": 0.5,
        "attributes_cut": 0.0,
        "unknown": 0.0,
    }
    assert "50.0% have their text cut at 3 tokens (data.max_tokens), 0.0% their attributes at 2" in table.describe()
    told = make_vocabulary(make_catalogue(texts, attributes), make_config(kind, max_attributes=1))
    assert told.encode_items([*texts, "", "!"], [*attributes, "new=1", ""]).measure()["attributes_cut"] == 0.5
    assert told.encode_items([*texts, "", "!"], [*attributes, "new=1", ""]).measure()["unknown"] == 0.5


def test_unknown_attributes_take_no_slot_of_known_ones():
    vocabulary = make(max_tokens=1, max_attributes=2)
    a = N_SPECIAL + vocabulary.n_text_tokens + vocabulary.attributes.index("brand=a")
    assert rows(vocabulary.encode([""], ["new=1 new=2 brand=a"])) == [[a, UNKNOWN]]


@pytest.mark.parametrize("kind", ["subwords", "words", "plain_words"])
def test_new_items_are_encoded_as_those_of_the_catalogue(kind, tmp_path):
    """Alone or beside others, by the vocabulary that was made and by the one that was kept."""
    vocabulary, path = make(kind), tmp_path / "item_tokens.json"
    table = vocabulary.encode_items(TITLES, ATTRIBUTES)
    vocabulary.save(path)
    kept = ItemVocabulary.load(path, make_config(kind))
    assert kept.digest == vocabulary.digest
    for k, item in enumerate(zip(TITLES, ATTRIBUTES, strict=True)):
        np.testing.assert_array_equal(kept.encode([item[0]], [item[1]])[0], table.ids[k])
    trimmed = table.trim().ids
    assert trimmed[:, -1].any()
    np.testing.assert_array_equal(table.ids[:, : trimmed.shape[1]], trimmed)
    assert not table.ids[:, trimmed.shape[1] :].any()
    np.testing.assert_array_equal(kept.encode(TITLES), kept.encode(TITLES, [""] * len(TITLES)))
    assert kept.encode([]).shape == (0, vocabulary.width)


@pytest.mark.parametrize("kind", ["subwords", "words", "plain_words"])
def test_the_order_of_the_items_is_no_matter(kind):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["tea", "teapot", "чай", "绿茶", "a", "e5", "xyz"], 4)) for _ in range(200)]
    expected = make_vocabulary(make_catalogue(texts), make_config(kind))
    for _ in range(3):
        rng.shuffle(texts)
        assert make_vocabulary(make_catalogue(texts), make_config(kind)).digest == expected.digest


def test_spellings_that_are_compatible_are_one_and_punctuation_takes_no_slot():
    vocabulary = make()
    alike = ["Green-Tea, (100 g)", "ＧＲＥＥＮ　ＴＥＡ 100 g", "green tea 100 g™", "green tea; 100 g."]
    ids = vocabulary.encode(alike)
    assert (ids == ids[0]).all()
    one, other = rows(vocabulary.encode(["й", "и\u0306"]))
    assert one == other


def test_a_given_tokenizer_is_used_as_it_is(tmp_path):
    """From its file or its folder; what a title says stands for no control token."""
    given_one = TextTokenizer.train(["Tea tea TEA, green tea"] * 3, 270)
    (tmp_path / "packed").mkdir()
    for name in ("tokenizer.json", "packed/tokenizer.json.gz"):
        given_one.save(tmp_path / name)
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "packed"):
        vocabulary = make(item_tokenizer=str(path), vocab_size=5)
        text = "Tea, GREEN tea <|endoftext|>"
        assert rows(vocabulary.encode([text])) == [(given_one.encode(text) + N_SPECIAL).tolist()]
        assert not {id + N_SPECIAL for id in given_one.control_ids} & set(vocabulary.encode([text]).ravel().tolist())
    with pytest.raises(InputError, match=r"none: no such file"):
        make(item_tokenizer=str(tmp_path / "none"))


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("kind", ["subwords", "words", "plain_words"])
def test_a_catalogue_without_any_text(kind, n):
    vocabulary = make_vocabulary(make_catalogue([""] * n), make_config(kind))
    table = vocabulary.encode_items([""] * n).trim()
    assert table.ids.tolist() == [[PAD]] * n
    assert table.measure()["unknown"] == (n > 0)
    assert vocabulary.n_tokens == N_SPECIAL + (256 if kind == "subwords" else 0)


def test_what_is_wrong_is_told(tmp_path):
    vocabulary, path = make(), tmp_path / "item_tokens.json"
    with pytest.raises(InputError, match=r"^items: 2 texts, and attributes of 1 items$"):
        vocabulary.encode(["a", "b"], ["x"])
    with pytest.raises(InputError, match=r"half of a surrogate pair"):
        vocabulary.encode(["a", "\ud800"])
    with pytest.raises(InputError, match=r"^data\.vocab_size 100 is too small: 256 bytes"):
        make(vocab_size=100)
    vocabulary.save(path)
    stored = json.loads(path.read_text())
    for change in ({"words": 3}, {"attributes": [1]}, {"tokenizer": None}, {"kind": 1}):
        path.write_text(json.dumps({**stored, **change}))
        with pytest.raises(InputError, match=rf"{path}: {next(iter(change))} is missing, or damaged"):
            ItemVocabulary.load(path, make_config())
    for change in ({"kind": "words"}, {"tokenizer": ""}):
        path.write_text(json.dumps({**stored, **change}))
        with pytest.raises(InputError, match=rf"{path}: is of "):
            ItemVocabulary.load(path, make_config())
    path.write_text(json.dumps({**stored, "tokenizer": "{}"}))
    with pytest.raises(InputError, match=rf"{path}: is no tokenizer"):
        ItemVocabulary.load(path, make_config())


def test_the_digest_tells_vocabularies_apart():
    first = make()
    others = [
        make(max_tokens=3),
        make(max_attributes=3),
        make(vocab_size=280),
        make("words"),
        dataclasses.replace(first, attributes=first.attributes[::-1]),
    ]
    assert len({x.digest for x in (first, make(), *others)}) == 1 + len(others)
