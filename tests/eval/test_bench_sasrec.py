"""What the bench of SASRec counts, and what it says where there is nothing to compare with."""

import dataclasses
import importlib.util

import pytest

from moerec.errors import InputError
from moerec.eval.bench.sasrec import list_matmuls, require_torch
from tests.tiny import make_config


def test_without_torch_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^PyTorch is not installed.*moerec\[hf\]"):
        require_torch()


@pytest.mark.parametrize("kind", ["one_negative", "sampled_softmax", "full_softmax"])
def test_the_matmuls_are_those_of_all_slots(kind):
    config = make_config()
    model, slots = config.model, config.train.batch_size * config.data.seq_len
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, kind=kind, n_negatives=20, chunk=32))
    found = sum(m * k * n * times for m, k, n, times in list_matmuls(config, 90))
    heads = model.n_heads * model.d_head + model.n_kv_heads * model.d_head
    weights = model.n_layers * model.d_model * (2 * heads + 3 * model.d_ff)
    candidates = {"one_negative": 0, "sampled_softmax": 20, "full_softmax": 90}[kind]
    assert found == slots * (weights + model.d_model * candidates)
