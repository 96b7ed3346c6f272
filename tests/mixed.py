"""A config of events and words in one stream, shrunk."""

import dataclasses

from moerec.config import Config, CorpusConfig, MixConfig, TextConfig
from tests import tiny

TASKS = ("next_event", "lm", "text_to_item", "item_to_text")


def make_mixed_config(n_vocab: int = 300, mix: MixConfig | None = None, **train) -> Config:
    """A tiny configuration of all four tasks; keywords replace fields of `train`."""
    base = tiny.make_config(**train)
    corpus = CorpusConfig(sources=("city=city:all",), city_documents=60, vocab_size=n_vocab, valid_fraction=0.1)
    mix = MixConfig(events=2, documents=1, item_texts=1, held_out=0.2, max_tokens=15) if mix is None else mix
    return dataclasses.replace(
        base,
        name="mixed",
        tasks=TASKS,
        data=dataclasses.replace(base.data, corpus=corpus, mix=mix),
        model=dataclasses.replace(base.model, text=TextConfig(vocab_size=n_vocab)),
    )
