"""Events and words in one stream on the built-in world: next events, documents about the city, items and their texts.

Command: python -m experiments.train --config=configs/city_words.py --workdir=runs/city_words

Of the 16 rows of a batch 8 are of events, 6 of documents and 2 of items with their texts. What it is compared with
trains on the same rows of events, or of documents, in as many steps:

    python -m experiments.train --config=configs/city_words.py --workdir=runs/city_words_events \
        --config.data.mix.documents=0 --config.data.mix.item_texts=0 --config.tasks='("next_event",)' \
        --config.loss.task_weights='()' --config.train.batch_size=8
    python -m experiments.train --config=configs/city_words.py --workdir=runs/city_words_text \
        --config.data.source=text --config.data.mix.documents=0 --config.data.mix.item_texts=0 \
        --config.tasks='("lm",)' --config.loss.task_weights='()' --config.train.batch_size=6 \
        --config.model.moe.services=false --config.model.pointer=none
Hardware: one CPU core, 2 minutes.
Result: union NDCG@10 .2253 (events alone .2271), bits per byte .1674 (documents alone .1703), means of ten worlds
(results/language.json).
"""

import dataclasses

from configs import city_moe
from moerec.config import Config, CorpusConfig, MixConfig, TextConfig

VOCABULARY = 2048


def get_config() -> Config:
    """The configuration of this file."""
    base = city_moe.get_config()
    corpus = CorpusConfig(sources=("city=city:all",), city_documents=4000, vocab_size=VOCABULARY, valid_fraction=0.05)
    mix = MixConfig(events=8, documents=6, item_texts=2, held_out=0.1, max_tokens=32)
    # A target of each user in each service, three times as many, since the differences to be told are small.
    split = dataclasses.replace(base.data.split, per_service=True, past_only=True)
    data = dataclasses.replace(base.data, corpus=corpus, mix=mix, first_event=True, split=split)
    # Six texts a step stand beside 800 events: with a mean that weighs as much, what each of them says of its item's
    # row and bias drowns what events say of it.
    weights = ("lm=0.5", "text_to_item=0.02", "item_to_text=0.2")
    return dataclasses.replace(
        base,
        name="city_words",
        data=data,
        tasks=("next_event", "lm", "text_to_item", "item_to_text"),
        model=dataclasses.replace(base.model, text=TextConfig(vocab_size=VOCABULARY, tie_head=True)),
        loss=dataclasses.replace(base.loss, vocab_chunk=VOCABULARY, task_weights=weights),
        optim=dataclasses.replace(base.optim, learning_rate=6e-3),
        train=dataclasses.replace(base.train, steps=1000, eval_every=250, save_every=500),
        baselines=(),
    )
