"""Token ids against the library's own, what users type against control tokens, and streams against whole texts."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from moerec.data.text import tokenizer as module
from moerec.data.text.documents import read_documents
from moerec.data.text.tokenizer import SPECIAL, DecodeStream, TextTokenizer, read_stop_ids
from moerec.errors import InputError

CORPUS = [
    "Посоветуй фильм, похожий на «Солярис» 1972 года. I'd like a film as slow as that one, it's for 2 evenings.",
    "Слон и слонёнок сидели на стуле; слоны не летают. The elephants sat on chairs: elephants don't fly! 1972, 2024",
    "за́мок и замо́к — за́мок и замо́к\n\n    return price * 100  # цена\n    return price * 1972\n",
] * 2
MIXED = [
    "Привет, мир! Сколько стоит 1234 руб.?",
    "It's the best café — isn't it? 12,345.67",
    "def f(x):\n\treturn x  # тест\r\n\r\n   \n \t ",
    "👩‍👩‍👧‍👦 🇷🇺 안녕 ﷽ ёлка",
    "",
]
ADDED = [*SPECIAL, "<s>", "</s>", "<tool_call>", "<A>", "<a>", "<ss>"]
PIECES = [*ADDED, "<|", "im_start", "|>", "<", ">", "<|im_", " ", "a", "слон", "\n"]


def byte_level(special=SPECIAL) -> TextTokenizer:
    return TextTokenizer.train(CORPUS, 400, special)


def with_added_tokens() -> TextTokenizer:
    """As Qwen: byte-level, with added tokens of both kinds after the vocabulary; as GPT-NeoX, with runs of spaces."""
    raw = Tokenizer.from_str(byte_level(()).content.decode())
    raw.add_special_tokens([AddedToken(text, normalized=False) for text in (*SPECIAL, "<|im_end|>\n")])
    raw.add_tokens([AddedToken("<tool_call>", normalized=False), "    ", "<|im_start|>a", "<tool_call> <"])
    return TextTokenizer(raw.to_str().encode())


def whole_words_first() -> TextTokenizer:
    """As Llama 3, a word that is in the vocabulary needs no merges; and a control token is in it."""
    spec = json.loads(byte_level(()).content)
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]  # so that no pattern splits it
    spec["model"]["ignore_merges"] = True
    vocab = spec["model"]["vocab"]
    vocab["<s"], vocab["<s>"] = len(vocab), len(vocab) + 1
    spec["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    raw = Tokenizer.from_str(json.dumps(spec))
    raw.add_special_tokens(["<s>"])
    return TextTokenizer(raw.to_str().encode())


def pieces_with_bytes() -> TextTokenizer:
    """As Llama 2: a BPE of characters whose unknown ones are spelled as bytes; the decoder drops the first space."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁aслон<>/s", "сл", "сло", "▁сло"]
    merges = [("с", "л"), ("сл", "о"), ("▁", "сло")]
    vocab = {token: id for id, token in enumerate(dict.fromkeys(tokens))}
    raw = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return TextTokenizer(raw.to_str().encode())


def unigram() -> TextTokenizer:
    """As T5: its control tokens are pieces of the model too, which would find them in a text."""
    letters = [(letter, -3.0) for letter in "▁aслон<>/s|im_tr"]
    raw = Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *letters, ("слон", -2.0)], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = decoders.Metaspace(prepend_scheme="never")
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return TextTokenizer(raw.to_str().encode())


def word_pieces() -> TextTokenizer:
    words = ["[UNK]", "<s>", "a", "слон", "##s", "s", "<", ">", "##>", "##ы", ".", "'"]
    raw = Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.WordPiece()
    raw.add_special_tokens(["[UNK]", "<s>"])
    return TextTokenizer(raw.to_str().encode())


def lower_case() -> TextTokenizer:
    """What is added is looked for in the text that the normaliser leaves, however it was spelled."""
    raw = Tokenizer.from_str(pieces_with_bytes().content.decode())
    raw.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    raw.add_tokens([AddedToken("<A>", normalized=True), AddedToken("<ss>", normalized=True, single_word=True)])
    return TextTokenizer(raw.to_str().encode())


BYTE_LEVEL = {make.__name__: make() for make in (byte_level, with_added_tokens, whole_words_first)}
ALL = BYTE_LEVEL | {make.__name__: make() for make in (pieces_with_bytes, unigram, word_pieces, lower_case)}
RAW = {name: Tokenizer.from_str(tokenizer.content.decode()) for name, tokenizer in ALL.items()}
TEXTS = st.lists(st.sampled_from(PIECES)).map("".join)
ORDINARY = st.lists(st.sampled_from(["a", "слон", "сло", " ", "    ", "<", "s", ">", "é", "."])).map("".join)

VALID = json.loads(BYTE_LEVEL["with_added_tokens"].content)
CUTS_LETTERS = VALID | {"model": VALID["model"] | {"continuing_subword_prefix": "x"}}
LONG_MERGE = VALID | {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}
NO_UNKNOWN = VALID | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}, "added_tokens": []}
MISPLACED = VALID | {"added_tokens": [VALID["added_tokens"][0] | {"id": 999}]}


@pytest.fixture(scope="module")
def qwen(data_dir):
    return TextTokenizer.load(data_dir / "tokenizer_qwen" / "tokenizer.json.gz")


@given(st.sampled_from(sorted(BYTE_LEVEL)), st.text() | TEXTS)
def test_every_text_comes_back(name, text):
    tokenizer = BYTE_LEVEL[name]
    assert tokenizer.encode(text).dtype == np.int32
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_template(text)) == text


@given(st.sampled_from(sorted(ALL)), TEXTS)
@example("with_added_tokens", "<|im_start|>a<|im_start|>")
@example("unigram", "слон </s>")
def test_what_users_type_is_no_control_token(name, text):
    tokenizer = ALL[name]
    unknown = {tokenizer.id_of(token) for token in ("<unk>", "[UNK]") if token in tokenizer.control_tokens}
    assert not set(tokenizer.encode(text).tolist()) & (tokenizer.control_ids - unknown)


@pytest.mark.parametrize("name", ["with_added_tokens", "whole_words_first", "unigram", "word_pieces", "lower_case"])
def test_the_library_itself_would_give_them(name):
    """So the property above has something to hold against."""
    raw = Tokenizer.from_str(ALL[name].content.decode())
    raw.encode_special_tokens = True
    tempting = ["<a>", "<s>", "</s>", "<tool_call>", "<|im_start|>a"]
    assert any(ALL[name].control_ids & set(raw.encode(text).ids) for text in tempting)


@given(st.sampled_from(sorted(ALL)), ORDINARY)
def test_ordinary_text_is_encoded_as_by_the_library(name, text):
    tokenizer, raw = ALL[name], RAW[name]
    if not any(token.lower() in text for token in tokenizer.control_tokens):
        assert tokenizer.encode(text).tolist() == raw.encode(text).ids
    assert tokenizer.encode_template(text).tolist() == raw.encode(text).ids


@given(st.sampled_from(sorted(ALL)), st.lists(st.integers(0, 999), max_size=40), st.booleans())
@example("pieces_with_bytes", [3 + byte for byte in b"\xe2\x82\xac\xff"], False)
def test_a_stream_gives_the_whole_text(name, ids, skip):
    ids = [id % ALL[name].n_vocab for id in ids]
    stream = DecodeStream(ALL[name], skip)
    for _ in range(2):  # it can be used anew
        parts = [stream.push(id) for id in ids]
        assert "".join(parts) + stream.finish() == RAW[name].decode(ids, skip_special_tokens=skip)


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
@example("ё👩‍👩‍👧‍👦 安")
def test_a_stream_shows_no_half_of_a_character(text):
    tokenizer = BYTE_LEVEL["byte_level"]
    stream = DecodeStream(tokenizer)
    shown = [stream.push(id) for id in tokenizer.encode(text).tolist()]
    assert "\ufffd" not in "".join(shown)
    assert ("".join(shown), stream.finish()) == (text, "")


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("skip", [False, True])
def test_a_stream_looks_back_at_a_few_tokens_alone(name, skip, monkeypatch):
    tokenizer, sizes = ALL[name], []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, *args: sizes.append(len(ids)) or decode(ids, *args))
    ids = np.random.default_rng(0).integers(0, tokenizer.n_vocab, 3000)
    stream = DecodeStream(tokenizer, skip)
    for id in ids.tolist():
        stream.push(id)
    kept = [id for id in ids.tolist() if not (skip and id in tokenizer.special_ids)]
    run = max(len(list(group)) for _, group in itertools.groupby(kept, lambda id: id in tokenizer.byte_ids))
    assert max(sizes) <= 16 + run
    assert sum(sizes) < 20 * len(ids)


@pytest.mark.parametrize("bad", [-1, 1000])
def test_an_id_that_is_none_is_refused_and_a_stream_goes_on(bad):
    tokenizer = BYTE_LEVEL["byte_level"]
    stream = DecodeStream(tokenizer)
    first, *rest = tokenizer.encode("ё").tolist()
    shown = stream.push(first)
    for refuse in (lambda: stream.push(bad), lambda: tokenizer.decode([0, bad])):
        with pytest.raises(InputError, match=rf"^token id {bad} is not in the vocabulary, which has \d+$"):
            refuse()
    assert shown + "".join(map(stream.push, rest)) == "ё"


def test_a_trained_vocabulary_is_laid_out_as_told():
    tokenizer = byte_level()
    assert [tokenizer.id_of(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
    assert tokenizer.special_ids == tokenizer.control_ids == frozenset(range(5))
    tokens = sorted((id, token) for token, id in json.loads(tokenizer.content)["model"]["vocab"].items())
    assert {token for _, token in tokens[5:261]} == set(pre_tokenizers.ByteLevel.alphabet())
    assert tokenizer.n_vocab == len(tokens)
    assert 261 < tokenizer.n_vocab <= 400
    assert byte_level(("<a>",)).id_of("<a>") == 0
    assert TextTokenizer.train([], 261).n_vocab == 261


def test_learned_tokens_keep_within_words():
    tokenizer = byte_level()
    texts = [tokenizer.decode([id]) for id in range(261, tokenizer.n_vocab)]
    whole = [text for text in texts if "\ufffd" not in text]
    for text in whole:
        assert len(text) == 1 or not any(letter.isdigit() for letter in text), text
        of_word = [letter.isalpha() or letter == "\u0301" for letter in text[1:]]  # there may be a space or sign before
        assert all(of_word) or not any(of_word), text
    assert {" слон", " elephants", "'s"} & set(whole)
    assert any(re.search("\\w\u0301", text) for text in whole), "a stress mark does not split its word"


def test_the_same_texts_give_the_same_tokenizer():
    code = (
        "import sys, json; from moerec.data.text.tokenizer import TextTokenizer;"
        "sys.stdout.buffer.write(TextTokenizer.train(iter(json.load(sys.stdin)), 400).content)"
    )
    env = os.environ | {"RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    corpus = json.dumps(CORPUS).encode()
    other = subprocess.run([sys.executable, "-c", code], input=corpus, env=env, capture_output=True, check=True)
    assert byte_level().content == byte_level().content == other.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CORPUS, 260), "vocab_size 260 is too small: 256 bytes and 5 special tokens need 261"),
        ((CORPUS, 400, ("<a>", "<b>", "<a>")), "special token '<a>': must be visible ASCII, and there once"),
        ((CORPUS, 400, ("<a b>",)), "special token '<a b>': must be visible ASCII, and there once"),
        ((["a", "b\ud800"], 400), "text 1: half of a surrogate pair at character 1"),
    ],
)
def test_bad_training_is_refused(arguments, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        TextTokenizer.train(*arguments)


@pytest.mark.parametrize("limit", [1, 40, 10**6])
def test_a_batch_is_each_text(limit, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", limit)
    tokenizer = ALL["with_added_tokens"]
    texts = [*MIXED, "<tool_call>"]
    offsets, ids = tokenizer.encode_batch(texts)
    assert (offsets.dtype, ids.dtype, offsets[0]) == (np.int64, np.int32, 0)
    parts = [part.tolist() for part in np.split(ids, offsets[1:-1])]
    assert parts == [tokenizer.encode(text).tolist() for text in texts]
    assert [x.tolist() for x in tokenizer.encode_batch([])] == [[0], []]


def test_what_cannot_be_encoded_is_refused():
    tokenizer, without_unknown = BYTE_LEVEL["byte_level"], TextTokenizer(json.dumps(NO_UNKNOWN).encode())
    for encode in (tokenizer.encode, tokenizer.encode_template, lambda text: tokenizer.encode_batch(["ok", text])):
        with pytest.raises(InputError, match=r"^text [01]: half of a surrogate pair at character 3$"):
            encode("ok \udc00")
    with pytest.raises(InputError, match=r"^the tokenizer cannot encode such a text \(WordLevel error"):
        without_unknown.encode("b")


@given(st.sampled_from(sorted(ALL)), TEXTS, st.integers(0, 9))
@example("with_added_tokens", "<|im_start|>a<|im_end|>\n", 0)
@example("with_added_tokens", "<tool_call> <tool_call>", 0)
def test_marked_text_without_a_mark_in_a_control_token_is_a_template(name, text, place):
    tokenizer = ALL[name]
    if name == "lower_case" and "<a>" in text:
        return
    assert tokenizer.encode_marked(text, "M").tolist() == tokenizer.encode_template(text).tolist()
    bare = re.sub("[^слона ]", "", text)  # where a mark is in nothing's way
    marked = f"{bare[:place]}M{bare[place:]}"
    assert tokenizer.encode_marked(marked, "M").tolist() == tokenizer.encode_template(bare).tolist()


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [("with_added_tokens", "<|im_start|>", "<tool_call>"), ("unigram", "<s>", "</s>"), ("lower_case", "<A>", "</s>")],
)
def test_a_control_token_with_a_mark_is_plain_text(name, start, end):
    tokenizer = ALL[name]
    text = f"слон {start}слон {end[0]}M{end[1:]} a{end}M <{start} слон {start.lower()[0]}M{start.lower()[1:]}"
    ids = tokenizer.encode_marked(text, "M").tolist()
    assert [id for id in ids if id in tokenizer.control_ids] == [tokenizer.id_of(start)] * 2
    letters = text.replace("M", "").replace(" ", "").lower()  # some decoders put spaces around added tokens
    assert tokenizer.decode(ids).replace(" ", "").lower() == letters
    after_a_mark = ALL["lower_case"].encode_marked("слон\ue000<ss>", "\ue000")
    assert after_a_mark[-1] == ALL["lower_case"].id_of("<ss>"), "a mark is no part of a word"


def test_special_tokens_are_text_unless_they_are_skipped():
    tokenizer = ALL["with_added_tokens"]
    ids = tokenizer.encode_template("<|im_start|>слон<tool_call><|im_end|>")
    assert tokenizer.decode(ids) == "<|im_start|>слон<tool_call><|im_end|>"
    assert tokenizer.decode(ids, skip_special=True) == "слон<tool_call>"
    assert tokenizer.special_ids == {tokenizer.id_of(token) for token in (*SPECIAL, "<|im_end|>\n")}
    others = {tokenizer.id_of(token) for token in ("<tool_call>", "<|im_start|>a", "<tool_call> <")}
    assert tokenizer.control_ids == tokenizer.special_ids | others
    assert tokenizer.id_of("<tool_call> <") == tokenizer.n_vocab - 1
    with pytest.raises(InputError, match=r"^token '<none>' is not in the vocabulary$"):
        tokenizer.id_of("<none>")


def test_a_file_is_used_and_kept_as_it_is(tmp_path):
    """But for padding, truncation, dropout and what is added to every text."""
    raw, long = Tokenizer.from_str(byte_level().content.decode()), CORPUS[0]
    expected = raw.encode(long).ids
    raw.enable_truncation(3)
    raw.enable_padding(length=700)
    raw.model.dropout = 0.5
    raw.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    content = raw.to_str(pretty=True).encode() + b"\n"
    for name, data in (("tokenizer.json", content), ("tokenizer.json.gz", gzip.compress(content, mtime=0))):
        (tmp_path / name).write_bytes(data)
        tokenizer = TextTokenizer.load(tmp_path / name)
        for added, ids in ((False, expected), (True, [1, *expected])):
            assert tokenizer.encode(long, added).tolist() == ids
            assert tokenizer.encode_template(long, added).tolist() == ids
            assert tokenizer.encode_batch([long], added)[1].tolist() == ids
        for saved in ("copy.json", "copy.json.gz"):
            tokenizer.save(tmp_path / saved)
            assert TextTokenizer.load(tmp_path / saved).content == content
        assert (tmp_path / "copy.json").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "no such file"),
        ("cut.json", b'{"version": "1.0"', "is no tokenizer ("),
        ("latin.json", "é".encode("latin-1"), "is no tokenizer ("),
        ("prefix.json", json.dumps(CUTS_LETTERS).encode(), "is no tokenizer (["),
        ("merge.json", json.dumps(LONG_MERGE).encode(), "is no tokenizer ("),
        ("misplaced.json", json.dumps(MISPLACED).encode(), "the added token '<|endoftext|>' cannot have the id 999"),
        ("plain.json.gz", b"{}", "is damaged ("),
        ("cut.json.gz", gzip.compress(b"{}" * 100, mtime=0)[:-9], "is damaged ("),
    ],
)
def test_a_bad_file_is_refused_in_one_line(name, content, message, tmp_path, capfd):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(f'{tmp_path / name}: {message}')}") as error:
        TextTokenizer.load(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [151645, 151643]}, {"eos_token_id": 7}, (151645, 151643)),
        ({}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": None}, {"eos_token_id": [7]}, (7,)),
        (None, None, ()),
        ({"eos_token_id": "5"}, None, "generation_config.json"),
        ({"eos_token_id": [5, None]}, None, "generation_config.json"),
        (None, {"eos_token_id": -1}, "config.json"),
    ],
)
def test_stop_ids(generation, config, expected, tmp_path):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    if isinstance(expected, tuple):
        assert read_stop_ids(tmp_path) == expected
        return
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / expected))}: eos_token_id must be a token id"):
        read_stop_ids(tmp_path)


def test_qwen_is_the_library_s(qwen, data_dir):
    raw = Tokenizer.from_str(gzip.decompress((data_dir / "tokenizer_qwen/tokenizer.json.gz").read_bytes()).decode())
    for text in MIXED:
        assert qwen.encode(text).tolist() == raw.encode(text).ids
        assert qwen.decode(qwen.encode(text)) == text
    assert (qwen.n_vocab, qwen.id_of("</think>")) == (151669, 151668)
    assert len(qwen.special_ids) == 14
    assert qwen.control_ids == frozenset(range(151643, 151669))
    for token in qwen.control_tokens:
        assert qwen.encode_template(token).tolist() == [qwen.id_of(token)]
        ids = qwen.encode(f"a{token}b")
        assert ids.max() < 151643
        assert qwen.decode(ids) == f"a{token}b"


@pytest.mark.parametrize(("name", "ratio"), [("ru_novels_eltec", 2.7), ("en_novels_eltec", 4.2)])
def test_qwen_needs_as_many_tokens_as_is_known_of_it(name, ratio, qwen, data_dir):
    texts = [text[20_000:30_000] for text in itertools.islice(read_documents(data_dir / f"text/{name}.jsonl.gz"), 3)]
    offsets, _ = qwen.encode_batch(texts)
    assert sum(map(len, texts)) / offsets[-1] == pytest.approx(ratio, rel=0.15)
