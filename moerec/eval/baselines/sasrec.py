"""SASRec (Kang & McAuley 2018) as a configuration of the same trainer: item rows alone, by its own objective and by a
sampled softmax; and the strongest form of it that knows of items and their order alone.
"""

import dataclasses

from moerec.config import AskConfig, Config, MixConfig, MoEConfig, PersonalConfig, TextConfig
from moerec.eval.baselines.base import BaselineInputs, TunedRanks, register_baseline
from moerec.eval.metrics import Ranks
from moerec.eval.ranking.rank import make_evaluator, rank_targets
from moerec.nn.model import count_params
from moerec.train.loop import fit


def sasrec_config(config: Config, name: str, loss_kind: str) -> Config:
    """The run's config with SASRec's model.

    Data, split, width, depth, dropout, scope of the loss, optimiser and number of steps are the run's own, so the
    budget is equal; none of them is tuned for it. The block is the decoder's, and a drawn negative may be an item of
    the user's history. Where sequences begin with a control slot (`data.first_event`), it carries the user's static
    fields, as it does in every model without a profile.
    """
    items_alone = dataclasses.replace(
        config.model,
        item_row=True,
        item_text=False,
        item_states=False,
        service=False,
        action=False,
        event_time=False,
        request_time=False,
        request_context=False,
        item_bias=False,
        tie_items=True,
        pointer="none",
        text_pointer=False,
        transition_pointer=False,
        crossing_pointer=False,
        pointer_time_bias=False,
        repeat_bias=False,
        untrained_rows=True,  # as in the original, where every item is a negative
        row_dropout=0.0,
        window=0,
        moe=MoEConfig(),
        personal=PersonalConfig(),
        ask=AskConfig(),
        text=TextConfig(),
    )
    return dataclasses.replace(
        config,
        name=f"{config.name}_{name}",
        data=dataclasses.replace(config.data, item_states="", mix=MixConfig()),
        model=items_alone,
        loss=dataclasses.replace(config.loss, kind=loss_kind, task_weights=()),
        optim=dataclasses.replace(config.optim, groups=()),
        train=dataclasses.replace(config.train, init_from="", init_rename=(), init_fresh=(), init_drop=()),
        tasks=("next_event",),
        baselines=(),
    )


def sasrec_full_config(config: Config, name: str) -> Config:
    """SASRec (texts, pointers): `sasrec_config` with what a strong sequential model has.

    - The loss is the softmax over all items of all services, with an item bias.
    - An item is its row and its text, or states of its text by a language model where the run has them; how rows of
      items without training events are treated (`untrained_rows`, `row_dropout`) is the run's own.
    - Pointers reach into the history (copy), and to the neighbors of its items' texts where the run has a table of
      these (`data.text_neighbors`).

    It has no service or action of an event, no time, no request's time or context, no profile, no experts; no service
    is asked, and there are no pointers to transitions.
    """
    items_alone = sasrec_config(config, name, "full_softmax")
    model = dataclasses.replace(
        items_alone.model,
        item_text=True,
        item_states=config.model.item_states,
        item_bias=True,
        pointer="all",
        text_pointer=config.data.text_neighbors > 0,
        untrained_rows=config.model.untrained_rows,
        row_dropout=config.model.row_dropout,
    )
    return dataclasses.replace(
        items_alone,
        data=dataclasses.replace(items_alone.data, item_states=config.data.item_states),
        model=model,
        loss=dataclasses.replace(items_alone.loss, scope="union"),
    )


def _rank(inputs: BaselineInputs, config: Config) -> Ranks:
    trained = fit(config, inputs.data, inputs.workdir, make_evaluator(config, inputs.data))
    size = {"n_params": count_params(trained.predictor.params), "steps": trained.steps, "seconds": trained.wall_s}
    return TunedRanks(rank_targets(trained.predictor, inputs.examples, trained.catalog), {}, size)


@register_baseline("sasrec_one_negative")
def rank_one_negative(inputs: BaselineInputs) -> Ranks:
    """SASRec with its own objective, one drawn negative a slot."""
    return _rank(inputs, sasrec_config(inputs.config, "sasrec_one_negative", "one_negative"))


@register_baseline("sasrec_sampled")
def rank_sampled(inputs: BaselineInputs) -> Ranks:
    """SASRec with the sampled softmax."""
    return _rank(inputs, sasrec_config(inputs.config, "sasrec_sampled", "sampled_softmax"))


@register_baseline("sasrec_full")
def rank_full(inputs: BaselineInputs) -> Ranks:
    """SASRec with the full softmax, item texts and pointers (`sasrec_full_config`)."""
    return _rank(inputs, sasrec_full_config(inputs.config, "sasrec_full"))
